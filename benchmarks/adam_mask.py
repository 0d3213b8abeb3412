"""How far masked units really move: masks on the gradient against masks on the update, under Adam and SGD.

Adam divides by the root of the squared gradient, so a constant factor on the gradient cancels: m -> c m, v -> c^2 v.
The table gives the movement of FFN rows with the mask over that without, next to what was intended, 1 - I: first with
torch's optimizers on full tensors, then with the package at every ZeRO stage on one and two ranks. After one step, when
both trainings have seen the same gradient, the mask on the update must give 1 - I up to rounding.

Run: `python benchmarks/adam_mask.py`
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

# A script finds only its own folder; the package, the tests' helpers and this package are siblings of it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import build_model, write_importance
from benchmarks.mask_training import Sizes, Training, build_config, train_on_ranks, train_with_torch
from benchmarks.result_io import print_table, write_result
from helpers.reference import Units, normalize, unit_ones
from helpers.run_ranks import run_ranks

# After the first step the masked and the free training see different gradients, so their ratio is only near 1 - I.
NUM_STEPS = 60
ADAMW = Training("adamw", learning_rate=2e-5, eps=1e-8, num_steps=NUM_STEPS)
ADAMW_LARGE_EPS = replace(ADAMW, eps=1e-6)
SGD = Training("sgd", learning_rate=1e-1, eps=0.0, num_steps=NUM_STEPS)
WITH_TORCH = (
    replace(ADAMW, mask="gradient"),
    replace(ADAMW_LARGE_EPS, mask="gradient"),
    replace(ADAMW, mask="update"),
    replace(SGD, mask="gradient"),
    replace(SGD, mask="update"),
)
ON_RANKS = (replace(ADAMW, mask="gradient"), replace(ADAMW, mask="update"))
ZERO_STAGES = (0, 1, 2, 3)
WORLD_SIZES = (1, 2)
ONE_STEP_FACTOR = 500
"""A single step is this much larger, so that the rounding of the weights is small compared with their movement."""

Movements = dict[Training, Tensor]
TrainAll = Callable[[list[Training]], list[Tensor]]


@dataclass(frozen=True)
class Intention:
    """Importance of the units that own the FFN rows, (L * (F + H),) in the order of `ffn_movement`."""

    importance: Tensor

    def row(self, trained_by: str, training: Training, moved: Movements) -> dict[str, Any]:
        """The table's row for a masked training."""
        single = one_step(training)
        ratio = moved[training] / moved[replace(training, mask=None)]
        single_ratio = moved[single] / moved[replace(single, mask=None)]
        protected = self.importance >= 0.9
        scale = 1 - self.importance
        return {
            "trained by": trained_by,
            "optimizer": "SGD" if training.optimizer == "sgd" else f"AdamW eps {training.eps:.0e}",
            "mask on": training.mask,
            "all units": ratio.mean().item(),
            "intended": scale.mean().item(),
            "I >= 0.9": ratio[protected].mean().item(),
            "intended, I >= 0.9": scale[protected].mean().item(),
            "one step: max abs(ratio - (1 - I))": (single_ratio - scale).abs().max().item(),
        }


def one_step(training: Training) -> Training:
    """The same training for one large step."""
    return replace(training, num_steps=1, learning_rate=ONE_STEP_FACTOR * training.learning_rate)


def draw_importance(model: Any) -> Units:
    """|tanh z| of standard normal importance, for all unit groups."""
    generator = torch.Generator().manual_seed(2)
    return {group: normalize(torch.randn(ones.shape, generator=generator)) for group, ones in unit_ones(model).items()}


def measure(
    train_all: TrainAll, masked: tuple[Training, ...], trained_by: str, intention: Intention
) -> list[dict[str, Any]]:
    """One row per masked training, each compared with its unmasked twin."""
    long = [twin for training in masked for twin in (training, replace(training, mask=None))]
    trainings = list(dict.fromkeys([*long, *map(one_step, long)]))
    moved = dict(zip(trainings, train_all(trainings), strict=True))
    return [intention.row(trained_by, training, moved) for training in masked]


def measure_all(sizes: Sizes, folder: Path) -> list[dict[str, Any]]:
    """The complete table."""
    path = folder / "importance.safetensors"
    model = build_model(build_config(sizes, ADAMW, path, zero_stage=0, world_size=1))
    units = draw_importance(model)
    write_importance(path, model, units)
    intention = Intention(torch.cat([units["intermediate"].flatten(), units["output"].flatten()]).double())
    rows = measure(lambda all_: [train_with_torch(sizes, t, path) for t in all_], WITH_TORCH, "torch", intention)
    for stage in ZERO_STAGES:
        for world_size in WORLD_SIZES:

            def train_all(all_: list[Training], stage: int = stage, world_size: int = world_size) -> list[Tensor]:
                return run_ranks(train_on_ranks, world_size, sizes, all_, path, stage, timeout=1800)[0]

            trained_by = f"das_ds, ZeRO {stage}, {world_size} rank" + "s" * (world_size > 1)
            rows += measure(train_all, ON_RANKS, trained_by, intention)
    return rows


def main() -> None:
    """Measures on the CPU, prints the table and writes the result file."""
    torch.set_num_threads(1)
    sizes = Sizes()
    with TemporaryDirectory() as folder:
        rows = measure_all(sizes, Path(folder))
    print_table(rows)
    settings = {**asdict(sizes), "one_step_factor": ONE_STEP_FACTOR, "trainings": [asdict(t) for t in WITH_TORCH]}
    print(f"written to {write_result('adam_mask', torch.device('cpu'), settings, rows).name}")


if __name__ == "__main__":
    main()
