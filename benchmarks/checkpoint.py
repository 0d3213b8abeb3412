"""What a checkpoint costs: how long training waits, its size, and the time to resume, at RoBERTa-base sizes.

Compares checkpoints of das_ds, asynchronous and synchronous, with DeepSpeed's `save_checkpoint` and with `torch.save`
of the same engine. These two neither read back what they wrote nor flush it to disk.

Run: `python -m benchmarks.checkpoint [--world-sizes 1 2] [--repeats 3]`
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.harness import build_method, build_model, optimizer_step, write_importance
from benchmarks.result_io import print_table, write_result
from benchmarks.step import Workload, build_batch, build_config, draw_importance
from das_ds.checkpoint.format import mutable_tensors
from das_ds.checkpoint.manifest import CheckpointMetadata, RunState
from das_ds.checkpoint.reader import CheckpointReader
from das_ds.checkpoint.saver import AsyncCheckpointer, SaveReport
from das_ds.checkpoint.store import CheckpointStore, find_latest_valid
from das_ds.distributed.process_group import init_process_group
from das_ds.distributed.rng import RngState
from das_ds.distributed.state import ComponentState
from das_ds.versions import library_versions
from helpers.run_ranks import run_ranks

ASYNCHRONOUS = "asynchronous"
SYNCHRONOUS = "synchronous"
DEEPSPEED = "DeepSpeed save_checkpoint"
TORCH = "torch.save"
ENGINE = "engine"
DOMAIN = "engine_domain"
METHOD = "method"
RNG = "rng"
TARGET = 0.05
"""Fraction of the synchronous wait below which the asynchronous one should stay."""
BYTES_PER_WEIGHT = 12
"""A weight and its two moments in float32."""
MIB = 2**20


class Checkpointed:
    """A method that trains on one batch, and its checkpoints in one folder; the same calls on every rank.

    Args:
        work: sizes, of the global batch.
        folder: contains `importance.safetensors` and receives the checkpoints.
    """

    def __init__(self, work: Workload, folder: Path) -> None:
        self.ranks = init_process_group()
        torch.set_num_threads(max((os.cpu_count() or 1) // self.ranks.info.world_size, 1))
        rank_work = Workload(**{**vars(work), "batch_size": work.batch_size // self.ranks.info.world_size})
        importance = {"init_from": str(folder / "importance.safetensors")}
        config = build_config(rank_work, {"name": "das", "importance": importance})
        global_batch = {"global_batch_size": work.batch_size}
        config = config.model_copy(update={"train": config.train.model_copy(update=global_batch), "output_dir": folder})
        self._batch = build_batch(rank_work).to(self.ranks.info.device)
        self._token_scale = torch.tensor(1 / self._batch.num_predicted)
        self.method = build_method(config, self.ranks)
        self.engine = self.method.run.engine
        self.store = CheckpointStore(folder / "checkpoints", keep=1)

    def step(self) -> None:
        """One optimizer step."""
        for _ in optimizer_step(self.method, self._batch, self._token_scale):
            pass

    def state_dicts(self) -> dict[str, ComponentState]:
        """Everything a run saves while it trains, but for a few numbers."""
        return {
            ENGINE: self.engine.state_dict(),
            DOMAIN: self.engine.domain_state_dict(),
            METHOD: self.method.state_dict(),
            RNG: RngState().state_dict(),
        }

    def save(self, saver: AsyncCheckpointer) -> SaveReport:
        """One checkpoint, and as many steps meanwhile as its writing takes."""
        metadata = CheckpointMetadata(
            domain="random",
            metrics_bytes=0,
            wandb_run_id=None,
            world_size=self.ranks.info.world_size,
            zero_stage=self.engine.zero_stage,
            versions=library_versions(),
        )
        saver.start(RunState(phase="train"), self.state_dicts(), metadata)
        if saver.asynchronous:
            self.step()
            while any(self.ranks.all_gather_object(saver.is_writing)):
                self.step()
        return saver.publish()

    def load(self) -> dict[str, float]:
        """Seconds to validate the latest checkpoint, and to resume from it."""
        began = time.perf_counter()
        manifest = find_latest_valid(self.store, self.ranks)
        checked = time.perf_counter()
        assert manifest is not None, "a checkpoint was saved"
        engine = self.engine
        reader = CheckpointReader(
            self.store.folder, manifest, self.ranks.info, engine.zero_stage, engine.weights.shards
        )
        engine.load_state_dict(reader.component(ENGINE))
        engine.load_domain_state_dict(reader.component(DOMAIN))
        self.method.load_state_dict(reader.component(METHOD))
        reader.close()
        self.ranks.barrier()
        return {"check s": checked - began, "load s": time.perf_counter() - checked}

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds until all ranks have done it."""
        self.ranks.barrier()
        began = time.perf_counter()
        work()
        self.ranks.barrier()
        return time.perf_counter() - began


def measure(work: Workload, repeats: int, folder: Path) -> list[dict[str, Any]]:
    """One row per way to save; to be called on every rank of a group of its own."""
    run = Checkpointed(work, folder)
    for _ in range(2):
        run.step()
    step_seconds = run.timed(run.step)
    rows = [product_row(run, way, repeats) for way in (ASYNCHRONOUS, SYNCHRONOUS)]
    rows += [deepspeed_row(run, folder / "deepspeed"), torch_row(run, folder / "torch")]
    minimum = minimum_mib(run)
    return [{**row, "MiB / minimum": row["MiB"] / minimum, "one step s": step_seconds} for row in rows]


def product_row(run: Checkpointed, way: str, repeats: int) -> dict[str, Any]:
    """Checkpoints of das_ds; medians without the first one, which allocates the staging buffers."""
    saver = AsyncCheckpointer(
        run.ranks, run.store, run.engine.weights.checkpoint_shards(), asynchronous=way == ASYNCHRONOUS
    )
    run.engine.on_weights_will_change = saver.wait_for_staging
    reports = [run.save(saver) for _ in range(1 + repeats)][1:]
    return {
        "way": way,
        "training waits s": median(report.stall_seconds for report in reports),
        "writing s": median(report.write_seconds for report in reports),
        **run.load(),
        "MiB": reports[-1].mebibytes,
    }


def deepspeed_row(run: Checkpointed, folder: Path) -> dict[str, Any]:
    """DeepSpeed's own checkpoint of the same engine."""
    engine = run.engine._engine
    seconds = run.timed(lambda: engine.save_checkpoint(str(folder), tag="x", save_latest=False))
    load = run.timed(lambda: engine.load_checkpoint(str(folder), tag="x"))
    return _foreign_row(DEEPSPEED, seconds, load, folder)


def torch_row(run: Checkpointed, folder: Path) -> dict[str, Any]:
    """The tensors in one pickle per rank."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{run.ranks.info.rank}.pt"
    tensors = mutable_tensors(run.state_dicts(), run.engine.weights.checkpoint_shards())
    seconds = run.timed(lambda: torch.save({key: value.clone() for key, value in tensors.items()}, path))
    return _foreign_row(TORCH, seconds, run.timed(lambda: torch.load(path, weights_only=True)), folder)


def _foreign_row(way: str, seconds: float, load: float, folder: Path) -> dict[str, Any]:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / MIB
    return {"way": way, "training waits s": seconds, "writing s": seconds, "check s": 0.0, "load s": load, "MiB": size}


def minimum_mib(run: Checkpointed) -> float:
    """Size of weights, moments and the method's state, each stored once."""
    weights = sum(parameter.numel() for parameter in run.engine.module.parameters())
    state = run.method.state_dict()
    method = sum(value.nbytes for value in state.replicated.values())
    return (weights * BYTES_PER_WEIGHT + method) / MIB


def main() -> None:
    """Measure all ways for every number of ranks, print the table and write the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2], help="numbers of ranks")
    parser.add_argument("--repeats", type=int, default=3, help="checkpoints of each way; their median counts")
    parser.add_argument("--num-layers", type=int, default=Workload.num_layers, help="12 is RoBERTa-base")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step over all ranks")
    parser.add_argument("--sequence-length", type=int, default=64)
    options = vars(parser.parse_args())
    repeats = options.pop("repeats")
    world_sizes = options.pop("world_sizes")
    work = Workload(**options, zero_stage=2)
    rows = []
    for world_size in world_sizes:
        with TemporaryDirectory() as folder:
            _write_importance(work, Path(folder))
            found = run_ranks(measure, world_size, work, repeats, Path(folder), timeout=3600)[0]
        rows += [{"ranks": world_size, **row} for row in found]
    print_table(rows)
    shares = _shares(rows)
    for world_size, share in shares.items():
        print(f"{world_size} ranks: waiting, asynchronous / synchronous: {share:.3f} (target: {TARGET})")
    settings = {**vars(work), "repeats": repeats, "asynchronous_over_synchronous": shares}
    print(f"written to {write_result('checkpoint', torch.device('cpu'), settings, rows).name}")


def _write_importance(work: Workload, folder: Path) -> None:
    # On the meta device: only the layout and sizes of this model are needed.
    with torch.device("meta"):
        model = build_model(build_config(work, {"name": "ncl"}))
    write_importance(folder / "importance.safetensors", model, draw_importance(model.config))


def _shares(rows: list[dict[str, Any]]) -> dict[int, float]:
    waits = {(row["ranks"], row["way"]): row["training waits s"] for row in rows}
    return {n: waits[n, ASYNCHRONOUS] / waits[n, SYNCHRONOUS] for n in dict.fromkeys(row["ranks"] for row in rows)}


if __name__ == "__main__":
    main()
