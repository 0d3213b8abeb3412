"""Parameter-level importance on two ranks at ZeRO 3, against brute force and plain autograd."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.parameter_importance_checks import (
    check_files_are_read_and_written_by_any_number_of_ranks,
    check_sums_equal_brute_force,
    check_training_equals_the_reference,
)

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize("kind", ["mlm", "proxy"])
def test_sum_over_gradients_stage_3_equals_brute_force(kind: str, tmp_path: Path) -> None:
    check_sums_equal_brute_force(kind, 3, 2, tmp_path)


def test_parameter_masks_stage_3_equal_reference(tmp_path: Path) -> None:
    check_training_equals_the_reference({"stage": 3}, 2, tmp_path)


def test_parameter_importance_save_and_load_on_two_ranks(tmp_path: Path) -> None:
    check_files_are_read_and_written_by_any_number_of_ranks(2, 3, tmp_path)
