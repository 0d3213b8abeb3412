"""A loss that is not a number, on two ranks: the step is skipped, or the run ends and can be restarted."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.faults import check_a_bad_step_is_left_out, check_by_default_what_is_not_finite_ends_the_run

pytestmark = pytest.mark.multirank


def test_nan_loss_at_stage_3_is_skipped(tmp_path: Path) -> None:
    check_a_bad_step_is_left_out(3, "nan", tmp_path)


def test_nan_loss_by_default_ends_run(tmp_path: Path) -> None:
    check_by_default_what_is_not_finite_ends_the_run("nan", "loss is nan", tmp_path)
