"""Evaluations within domains, on two ranks at ZeRO 3: training does not notice them, and they resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.domain_evaluation import (
    check_evaluations_leave_training_as_it_is,
    check_run_in_pieces_equals_the_complete_run,
)

pytestmark = pytest.mark.multirank


def test_training_is_bitwise_that_without_evaluations(tmp_path: Path) -> None:
    check_evaluations_leave_training_as_it_is(3, tmp_path)


def test_run_stopped_within_evaluations_equals_uninterrupted_run(tmp_path: Path) -> None:
    limits = {"general": 0.01, "earlier": 0.01, "action": "rollback"}
    check_run_in_pieces_equals_the_complete_run(3, tmp_path, 4, keep_best=True, faults=limits)
