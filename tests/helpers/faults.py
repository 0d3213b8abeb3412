"""Training on random batches in which chosen steps go wrong, on real ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from das_ds.config import RunConfig
from das_ds.data.batch import Batch
from das_ds.distributed.process_group import init_process_group
from das_ds.methods import METHODS
from das_ds.methods.base import Losses, Method
from das_ds.reporting.results import Results
from das_ds.training.train import train
from helpers.half import allow_fp16_on_cpu
from helpers.run_ranks import run_ranks
from helpers.runs import exported_weights, metrics_lines, run_all, small_run

STEP = 13
"""The step that goes wrong; the window of the spikes is full by then."""


def faulty_run(folder: Path, name: str, stage: int, **faults: Any) -> dict[str, Any]:
    """A run over one domain with these keys of section `faults`."""
    base = small_run(folder)
    return {
        **base,
        "output_dir": folder / name,
        "domains": base["domains"][:1],
        "train": {**base["train"], "micro_batch_size": 2, "steps_per_domain": 16, "log_interval": 1},
        "method": {"name": "ncl"},
        "deepspeed": {"zero_optimization": {"stage": stage}},
        "checkpoint": {"interval": 5},
        "faults": {"spike_window": 8, **faults},
        "evaluation": {"max_sequences": 4},
    }


def run_with_fault(values: dict[str, Any], kind: str, at: int) -> Results:
    """A run whose optimizer step number `at` (from 0, as it is first reached) has a bad loss or gradient on rank 1."""
    allow_fp16_on_cpu()
    ranks = init_process_group()
    config = RunConfig(**values)
    method = METHODS[config.method.name]
    original = method.losses
    calls = 0
    per_step = config.train.global_batch_size // config.train.micro_batch_size // ranks.info.world_size

    @contextmanager
    def faulty(self: Method, batch: Batch, token_scale: torch.Tensor) -> Iterator[Losses]:
        nonlocal calls
        with original(self, batch, token_scale) as losses:
            is_bad = calls // per_step == at and ranks.info.rank == ranks.info.world_size - 1
            calls += 1
            yield _spoiled(losses, kind) if is_bad else losses

    method.losses = faulty  # type: ignore[assignment,method-assign]
    try:
        return train(config, ranks)
    finally:
        method.losses = original  # type: ignore[method-assign]


def _spoiled(losses: Losses, kind: str) -> Losses:
    name, loss = next(iter(losses.items()))
    factor = {"nan": float("nan"), "spike": 1000.0}.get(kind)
    if factor is not None:
        return {**losses, name: loss * factor}
    return {**losses, name: _Explode.apply(loss)}


class _Explode(torch.autograd.Function):
    """The value stays as it is; its gradient is infinite."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * float("inf")


def check_a_bad_step_is_left_out(stage: int, kind: str, folder: Path) -> None:
    """A step that goes wrong changes neither weights nor schedule."""
    run_ranks(run_with_fault, 2, faulty_run(folder, "run", stage, nonfinite="skip", spike="skip"), kind, STEP)
    lines = metrics_lines(folder / "run")
    bad = lines[STEP]
    after = lines[STEP + 1]
    assert [line["skipped_steps"] for line in lines] == [0] * STEP + [1] * 3
    # The schedule waits, the data advance, and later steps are unaffected.
    assert after["lr"] == bad["lr"] and after["tokens_seen"] > bad["tokens_seen"]
    assert all(math.isfinite(float(line["loss"])) for line in lines if line is not bad)
    assert all(weight.isfinite().all() for weight in exported_weights(folder / "run", "00_food").values())


def check_by_default_what_is_not_finite_ends_the_run(kind: str, what: str, folder: Path) -> None:
    """An error that names the step, after which the same command continues."""
    values = faulty_run(folder, "run", 2)
    with pytest.raises(RuntimeError, match=rf"TrainingError: food, step {STEP + 1}: {what}.*lower train.learning_rate"):
        run_ranks(run_with_fault, 2, values, kind, STEP)
    # The fault was transient: the same command continues from before it.
    assert run_ranks(run_all, 2, [values])[0][0].complete
    assert [line["global_step"] for line in metrics_lines(folder / "run")] == list(range(1, 17))
