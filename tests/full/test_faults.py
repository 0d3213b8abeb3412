"""Losses and gradients that go wrong within a run: skipped, an error, or a rollback to the newest checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.faults import (
    STEP,
    check_a_bad_step_is_left_out,
    check_by_default_what_is_not_finite_ends_the_run,
    faulty_run,
    run_with_fault,
)
from helpers.run_ranks import run_ranks
from helpers.runs import exported_weights, metrics_lines

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize(("stage", "kind"), [(0, "nan"), (0, "gradient"), (2, "spike"), (2, "gradient")])
def test_bad_step_is_skipped(stage: int, kind: str, tmp_path: Path) -> None:
    check_a_bad_step_is_left_out(stage, kind, tmp_path)


def test_nonfinite_gradient_by_default_ends_run(tmp_path: Path) -> None:
    check_by_default_what_is_not_finite_ends_the_run("gradient", "gradient norm is not finite", tmp_path)


def test_spike_by_default_is_accepted_with_warning(tmp_path: Path) -> None:
    run_ranks(run_with_fault, 2, faulty_run(tmp_path, "run", 2), "spike", STEP)
    lines = metrics_lines(tmp_path / "run")
    assert lines[-1]["skipped_steps"] == 0 and lines[STEP]["loss"] > 100


@pytest.mark.parametrize("stage", [0, 3])
def test_rewound_run_equals_run_without_that_step(stage: int, tmp_path: Path) -> None:
    skipped, rewound = (faulty_run(tmp_path, name, stage, nonfinite=name, spike=name) for name in ("skip", "rewind"))
    run_ranks(run_with_fault, 2, skipped, "spike", STEP)
    run_ranks(run_with_fault, 2, rewound, "spike", STEP)
    mine, theirs = (exported_weights(tmp_path / name, "00_food") for name in ("rewind", "skip"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    lines = metrics_lines(tmp_path / "rewind")
    assert [line["global_step"] for line in lines] == list(range(1, 17))
    assert [line["skipped_steps"] for line in lines] == [0] * STEP + [1] * 3
