"""One domain of five steps, as the product runs it and as the reference gives it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from das_ds.config import RunConfig
from das_ds.data.batch import Batch
from das_ds.models.architectures.registry import spec_for
from das_ds.softmask.importance_file import save_unit_importance
from helpers.reference import reference_train
from helpers.tiny_models import NO_DROPOUT, random_importance, tiny_model
from helpers.training import random_batch, run_config

NUM_STEPS = 5
ROWS = 4
ACCUMULATION = 2
# The gradient of key biases is zero but for rounding (softmax ignores a constant added to all keys); a smaller eps
# would let Adam blow that rounding up to full steps.
EPS = 1e-4
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SETTINGS = (
    {"apply_to": "update"},
    {"apply_to": "gradient"},
    {"apply_to": "update", "include_consumers": True, "unowned_update_scale": 0.5},
)


def relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference of any weight, relative to the largest weight of its tensor."""
    assert found.keys() == expected.keys()
    return max(((found[n] - expected[n]).abs().max() / expected[n].abs().max()).item() for n in expected)


def configs(folder: Path, world_size: int, zero: dict[str, Any], precision: str = "fp32") -> list[RunConfig]:
    """One run per entry of `SETTINGS`."""
    initial = {"init_from": str(folder / "importance.safetensors")}
    methods = [{"softmask": softmask, "importance": initial} for softmask in SETTINGS]
    return parity_configs(folder, world_size, zero, methods, precision)


def parity_configs(
    folder: Path,
    world_size: int,
    zero: dict[str, Any],
    methods: list[dict[str, Any]],
    precision: str = "fp32",
    *,
    num_rows: int = ROWS,
    **changes: Any,
) -> list[RunConfig]:
    """One run per method section, on micro-batches of so many rows over all ranks; `changes` are keys of `train`."""
    train = {
        "micro_batch_size": num_rows // world_size,
        "global_batch_size": num_rows * ACCUMULATION,
        "precision": precision,
        "eps": EPS,
        **changes,
    }
    return [
        run_config(
            folder,
            train={**run_config(folder).train.model_dump(), **train},
            deepspeed={"zero_optimization": zero},
            method=method,
        )
        for method in methods
    ]


def save_random_importance(folder: Path) -> None:
    """The importance file that `configs` names."""
    model = tiny_model()
    layout = spec_for("roberta").layout(model)
    save_unit_importance(folder / "importance.safetensors", random_importance(model), layout)


def steps() -> list[list[Batch]]:
    """Joined micro-batches of every optimizer step."""
    return [[random_batch(ROWS, 10 * step + m) for m in range(ACCUMULATION)] for step in range(NUM_STEPS)]


@cache
def reference(setting: int) -> Any:
    """What `SETTINGS[setting]` has to give, in float64."""
    model = tiny_model(**NO_DROPOUT)
    return reference_train(
        model,
        [[vars(batch) for batch in step] for step in steps()],
        random_importance(model),
        learning_rates=[1e-2 * (NUM_STEPS - step) / NUM_STEPS for step in range(NUM_STEPS)],
        eps=EPS,
        max_grad_norm=0.5,
        dtype=torch.float64,
        **SETTINGS[setting],  # type: ignore[arg-type]
    )
