"""Losses and gradients that go wrong within a run: left out, an error, or back to the newest checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.faults import run_with_fault
from helpers.run_ranks import run_ranks
from helpers.runs import exported_weights, metrics_lines, run_all, small_run

pytestmark = pytest.mark.multirank

STEP = 13
"""The step that goes wrong; the window of the spikes is full by then."""


def run(folder: Path, name: str, stage: int, **faults: Any) -> dict[str, Any]:
    base = small_run(folder)
    return {
        **base,
        "output_dir": folder / name,
        "domains": base["domains"][:1],
        "train": {**base["train"], "micro_batch_size": 2, "steps_per_domain": 16, "log_every": 1},
        "method": {"name": "ncl"},
        "deepspeed": {"zero_optimization": {"stage": stage}},
        "checkpoint": {"every_steps": 5},
        "faults": {"spike_window": 8, **faults},
        "evaluation": {"max_sequences": 4},
    }


@pytest.mark.parametrize(("stage", "kind"), [(0, "nan"), (0, "gradient"), (2, "spike"), (2, "gradient"), (3, "nan")])
def test_a_bad_step_is_left_out(stage: int, kind: str, tmp_path: Path) -> None:
    run_ranks(run_with_fault, 2, run(tmp_path, "run", stage, nonfinite="skip", spike="skip"), kind, STEP)
    lines = metrics_lines(tmp_path / "run")
    bad, after = lines[STEP], lines[STEP + 1]
    assert [line["skipped_steps"] for line in lines] == [0] * STEP + [1] * 3
    # The schedule waits, the data go on, and nothing that follows is touched.
    assert after["lr"] == bad["lr"] and after["tokens_seen"] > bad["tokens_seen"]
    assert all(math.isfinite(float(line["loss"])) for line in lines if line is not bad)
    assert all(weight.isfinite().all() for weight in exported_weights(tmp_path / "run", "00_food").values())


@pytest.mark.parametrize(("kind", "what"), [("nan", "loss is nan"), ("gradient", "gradient norm is not finite")])
def test_by_default_what_is_not_finite_ends_the_run(kind: str, what: str, tmp_path: Path) -> None:
    values = run(tmp_path, "run", 2)
    with pytest.raises(RuntimeError, match=rf"TrainingError: food, step {STEP + 1}: {what}.*lower train.learning_rate"):
        run_ranks(run_with_fault, 2, values, kind, STEP)
    # The fault was passing: the same command goes on from before it.
    assert run_ranks(run_all, 2, [values])[0][0].complete
    assert [line["global_step"] for line in metrics_lines(tmp_path / "run")] == list(range(1, 17))


def test_a_spike_is_taken_with_a_warning_by_default(tmp_path: Path) -> None:
    run_ranks(run_with_fault, 2, run(tmp_path, "run", 2), "spike", STEP)
    lines = metrics_lines(tmp_path / "run")
    assert lines[-1]["skipped_steps"] == 0 and lines[STEP]["loss"] > 100


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_that_goes_back_is_the_run_without_that_step(stage: int, tmp_path: Path) -> None:
    skipped, rewound = (run(tmp_path, name, stage, nonfinite=name, spike=name) for name in ("skip", "rewind"))
    run_ranks(run_with_fault, 2, skipped, "spike", STEP)
    run_ranks(run_with_fault, 2, rewound, "spike", STEP)
    mine, theirs = (exported_weights(tmp_path / name, "00_food") for name in ("rewind", "skip"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    lines = metrics_lines(tmp_path / "rewind")
    assert [line["global_step"] for line in lines] == list(range(1, 17))
    assert [line["skipped_steps"] for line in lines] == [0] * STEP + [1] * 3
