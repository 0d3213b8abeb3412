"""Cost of the soft mask in a complete DAS step: seconds and peak memory at RoBERTa-base sizes, ZeRO 2 and 3.

The same step (one packed forward pass with contrast) without a mask, with unit importance, and with the importance of
every weight. Every form has processes of its own, so that the peaks are its own.

Run: `python -m benchmarks.mask_cost [--num-layers 12] [--world-size 2]`
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.harness import build_model
from benchmarks.result_io import default_device, print_table, write_result
from benchmarks.step import ProductForm, Workload, build_batch, build_config, draw_importance, time_step
from das_ds.distributed.process_group import init_process_group
from das_ds.methods.das import DAS
from das_ds.models.architectures.registry import spec_for
from das_ds.softmask.importance_file import save_parameter_importance, save_unit_importance
from das_ds.tracking.throughput import peak_memory_gib
from helpers.run_ranks import run_ranks

UNMASKED = "no mask"
UNIT = "unit"
PARAMETER = "parameter"
STAGES = (2, 3)
WARM_UP = 1


def method_config(mask: str, folder: Path) -> dict[str, Any]:
    """The method section of one form."""
    importance = {"init_from": str(folder / f"{mask}.safetensors")}
    return {"name": "das", "importance": {**importance, "granularity": PARAMETER if mask == PARAMETER else UNIT}}


def write_importance_files(work: Workload, folder: Path) -> None:
    """Random importance of units and of weights, where `method_config` looks for it."""
    # Sizes are all that is wanted of this model.
    with torch.device("meta"):
        model = build_model(build_config(work, {"name": "ncl"}))
    layout = spec_for(model.config.model_type).layout(model)
    generator = torch.Generator().manual_seed(3)
    units = draw_importance(model.config)
    save_unit_importance(folder / f"{UNIT}.safetensors", units, layout)
    save_unit_importance(folder / f"{UNMASKED}.safetensors", units, layout)
    weights = {
        name: torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
        for name, size in layout.sizes.items()
    }
    save_parameter_importance(folder / f"{PARAMETER}.safetensors", weights, layout)


def train(work: Workload, mask: str, folder: Path, repeats: int) -> dict[str, float]:
    """Fastest step by phase and peak memory of this rank; to be called on every rank of a group of its own."""
    ranks = init_process_group()
    if mask == UNMASKED:
        DAS.protect = lambda self: None  # type: ignore[method-assign]
    rank_work = Workload(**{**vars(work), "batch_size": work.batch_size // ranks.info.world_size})
    config = build_config(work, method_config(mask, folder))
    micro = {"micro_batch_size": rank_work.batch_size}
    config = config.model_copy(update={"train": config.train.model_copy(update=micro)})
    step = ProductForm(config, ranks, build_batch(rank_work).to(ranks.info.device))
    timed = [time_step(step, ranks.info.device) for _ in range(WARM_UP + repeats)][WARM_UP:]
    fastest = min(timed, key=lambda phases: sum(phases.values()))
    ranks.close()
    return {"seconds": sum(fastest.values()), **fastest, "peak GiB": peak_memory_gib()}


def measure(work: Workload, world_size: int, repeats: int, folder: Path) -> list[dict[str, Any]]:
    """One row per stage and mask: times of rank 0 and the largest peak of a rank."""
    write_importance_files(work, folder)
    rows: list[dict[str, Any]] = []
    for stage, mask in product(STAGES, (UNMASKED, UNIT, PARAMETER)):
        staged = Workload(**{**vars(work), "zero_stage": stage})
        found = run_ranks(train, world_size, staged, mask, folder, repeats, timeout=3600)
        rows.append({"ZeRO": stage, "mask": mask, **found[0], "peak GiB": max(rank["peak GiB"] for rank in found)})
        unmasked = next(row for row in rows if row["ZeRO"] == stage)
        rows[-1]["update / no mask"] = rows[-1]["update"] / unmasked["update"]
        rows[-1]["step / no mask"] = rows[-1]["seconds"] / unmasked["seconds"]
    return rows


def main() -> None:
    """Measures all forms, prints the table and writes the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="timed steps per form; the fastest counts")
    parser.add_argument("--batch-size", type=int, default=Workload.batch_size, help="sequences per step, all ranks")
    parser.add_argument("--num-layers", type=int, default=Workload.num_layers, help="12 is RoBERTa-base")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=Workload.precision)
    parser.add_argument("--world-size", type=int, default=1 if torch.cuda.is_available() else 2)
    options = vars(parser.parse_args())
    repeats = options.pop("repeats")
    world_size = options.pop("world_size")
    work = Workload(**options)
    with TemporaryDirectory() as folder:
        rows = measure(work, world_size, repeats, Path(folder))
    print_table(rows)
    settings = {**{k: v for k, v in vars(work).items() if k != "zero_stage"}, "ranks": world_size, "repeats": repeats}
    print(f"written to {write_result('mask_cost', default_device(), settings, rows).name}")


if __name__ == "__main__":
    main()
