"""Seconds per optimizer step at RoBERTa-base sizes: plain MLM, DAS as built, and DAS as the released code does it.

Plain MLM and DAS are the package's `ncl` and `das` methods over its own DeepSpeed engine, on one rank; the released
form is written out in `reference_continuallm.py`. All have the same sizes, batch, dropout and AdamW settings
and clip no gradient.

Run: `python benchmarks/step.py [--repeats 5] [--precision bf16]`
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch

# A script finds only its own folder; the package and this one are siblings of it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import build_method, build_model, optimizer_step, run_config, write_importance
from benchmarks.reference_continuallm import ATTENTION, ReferenceStep
from benchmarks.result_io import print_table, write_result
from benchmarks.timing import now
from das_ds.config import RunConfig
from das_ds.data.batch import Batch
from das_ds.distributed.process_group import ProcessGroup, init_process_group

PLAIN = "plain MLM"
DAS = "DAS as built"
RELEASED = "DAS, released form"
BUDGET = {"cpu": {PLAIN: 3.7, RELEASED: 0.6}, "cuda": {RELEASED: 0.5}}
"""Device type -> form -> largest ratio of a DAS step to it."""
PHASES = ("forward", "backward", "update")
MASK_TOKEN = 50264
FIRST_WORD = 5
GIB = 2**30


@dataclass(frozen=True)
class Workload:
    """Sizes of one step; the network is RoBERTa-base with random weights unless `num_layers` says less."""

    batch_size: int = 4
    sequence_length: int = 164
    mlm_probability: float = 0.15
    num_layers: int = 12
    precision: str = "fp32"
    zero_stage: int = 0


class Form(Protocol):
    """One way to do an optimizer step."""

    def step(self) -> Iterator[None]:
        """One optimizer step, pausing at the end of each phase."""


class ProductForm:
    """A method of the package over its engine."""

    def __init__(self, config: RunConfig, ranks: ProcessGroup, batch: Batch) -> None:
        self._method = build_method(config, ranks)
        self._batch = batch
        self._token_scale = torch.tensor(1 / batch.num_predicted, device=ranks.info.device)

    def step(self) -> Iterator[None]:
        """One optimizer step, pausing at the end of each phase."""
        return optimizer_step(self._method, self._batch, self._token_scale)


def build_config(work: Workload, method: dict[str, Any]) -> RunConfig:
    """RoBERTa-base, but for the number of layers; dropout is on."""
    model = {
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "num_hidden_layers": work.num_layers,
    }
    train = {
        "global_batch_size": work.batch_size,
        "micro_batch_size": work.batch_size,
        "precision": work.precision,
    }
    return run_config(model, train, method, sequence_length=work.sequence_length, zero_stage=work.zero_stage)


def build_batch(work: Workload) -> Batch:
    """Random words, a share of them masked."""
    generator = torch.Generator().manual_seed(1)
    shape = (work.batch_size, work.sequence_length)
    num_tokens = work.batch_size * work.sequence_length
    flat = torch.randint(FIRST_WORD, MASK_TOKEN, (num_tokens,), generator=generator)
    predicted = torch.randperm(num_tokens, generator=generator)[: round(work.mlm_probability * num_tokens)]
    return Batch(
        input_ids=flat.view(shape),
        corrupted_ids=flat.index_fill(0, predicted, MASK_TOKEN).view(shape),
        predicted=predicted,
        targets=flat[predicted],
        row_weights=torch.ones(work.batch_size),
    )


def draw_importance(config: Any) -> dict[str, torch.Tensor]:
    """Uniform importance in [0, 1) for the units of a RoBERTa."""
    generator = torch.Generator().manual_seed(2)
    sizes = {"head": config.num_attention_heads, "intermediate": config.intermediate_size, "output": config.hidden_size}
    return {group: torch.rand(config.num_hidden_layers, size, generator=generator) for group, size in sizes.items()}


def build_released(config: RunConfig, importance: dict[str, torch.Tensor], batch: Batch, device: torch.device) -> Form:
    """The released code's step, with torch's fused AdamW."""
    model = build_model(config).to(device).train()
    model.set_attn_implementation(ATTENTION)
    train = config.train
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=train.learning_rate,
        betas=train.betas,
        eps=train.eps,
        weight_decay=train.weight_decay,
        fused=True,
    )
    on_device = {group: values.to(device) for group, values in importance.items()}
    return ReferenceStep(model, optimizer, batch, on_device, train.precision)


def builders(work: Workload, ranks: ProcessGroup, folder: Path) -> dict[str, Callable[[], Form]]:
    """Name of each form -> what builds it."""
    device = ranks.info.device
    path = folder / "importance.safetensors"
    plain = build_config(work, {"name": "ncl"})
    das = build_config(work, {"name": "das", "importance": {"init_from": str(path)}})
    # Layout and sizes are all that is wanted of this model.
    with torch.device("meta"):
        skeleton = build_model(plain)
    importance = draw_importance(skeleton.config)
    batch = build_batch(work).to(device)
    write_importance(path, skeleton, importance)
    return {
        PLAIN: partial(ProductForm, plain, ranks, batch),
        DAS: partial(ProductForm, das, ranks, batch),
        RELEASED: partial(build_released, plain, importance, batch, device),
    }


def time_step(form: Form, device: torch.device) -> dict[str, float]:
    """Seconds of each phase of one step."""
    marks = [now(device)]
    marks.extend(now(device) for _ in form.step())
    return {phase: marks[index + 1] - marks[index] for index, phase in enumerate(PHASES)}


def warm_up(build: Callable[[], Form], device: torch.device) -> tuple[Form, dict[str, float]]:
    """A form after two steps and, on a GPU, the peak of what it alone has allocated there in the second."""
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    form = build()
    time_step(form, device)
    if device.type != "cuda":
        return form, {}
    torch.cuda.reset_peak_memory_stats(device)
    time_step(form, device)
    return form, {"peak GiB": (torch.cuda.max_memory_allocated(device) - before) / GIB}


def measure(builds: dict[str, Callable[[], Form]], device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """One row per form: its fastest step, by phase."""
    warm = {name: warm_up(build, device) for name, build in builds.items()}
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in warm}
    # In turns, so that other load on the machine falls on every form alike.
    for _ in range(repeats):
        for name, (form, _) in warm.items():
            steps[name].append(time_step(form, device))
    fastest = {name: min(timed, key=lambda step: sum(step.values())) for name, timed in steps.items()}
    seconds = {name: sum(step.values()) for name, step in fastest.items()}
    return [
        {
            "step": name,
            "seconds": seconds[name],
            **step,
            **{f"over {other}": seconds[name] / seconds[other] for other in (PLAIN, RELEASED)},
            **warm[name][1],
        }
        for name, step in fastest.items()
    ]


def main() -> None:
    """Times all forms, prints the table and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps per form; the fastest counts")
    parser.add_argument("--batch-size", type=int, default=Workload.batch_size, help="sequences per step")
    parser.add_argument("--num-layers", type=int, default=Workload.num_layers, help="12 is RoBERTa-base")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=Workload.precision)
    parser.add_argument("--zero-stage", type=int, choices=(0, 1, 2), default=Workload.zero_stage)
    options = vars(parser.parse_args())
    repeats = options.pop("repeats")
    work = Workload(**options)
    ranks = init_process_group()
    with TemporaryDirectory() as folder:
        rows = measure(builders(work, ranks, Path(folder)), ranks.info.device, repeats)
    print_table(rows)
    das = next(row for row in rows if row["step"] == DAS)
    for name, limit in BUDGET[ranks.info.device.type].items():
        print(f"{DAS} / {name}: {das[f'over {name}']:.2f} (budget at the default sizes: {limit})")
    path = write_result("step", ranks.info.device, {**asdict(work), "repeats": repeats}, rows)
    print(f"written to {path.name}")
    ranks.close()


if __name__ == "__main__":
    main()
