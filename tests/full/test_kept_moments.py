"""Moments kept at the border of domains, at the other stages, precisions and numbers of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.compiled_ops import LONGEST_COMPILATION_S
from helpers.kept_moments_checks import check_divided_run_equals_one, check_kept_moments_are_masked

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize(
    ("stage", "world_size", "precision"),
    [
        (0, 1, "fp32"),
        (0, 2, "bf16"),
        (1, 2, "fp32"),
        (1, 2, "fp16"),
        (2, 1, "bf16"),
        (2, 2, "fp32"),
        (2, 2, "fp16"),
        (3, 1, "fp32"),
        (3, 2, "bf16"),
    ],
)
def test_domains_with_kept_moments_are_one(stage: int, world_size: int, precision: str, tmp_path: Path) -> None:
    check_divided_run_equals_one(tmp_path, stage, world_size, precision)


def test_domains_with_kept_moments_of_cpu_adam_are_one(tmp_path: Path) -> None:
    """It is compiled where no earlier test has done so."""
    check_divided_run_equals_one(tmp_path, 2, 2, "fp32", "cpu_adam", timeout=LONGEST_COMPILATION_S)


@pytest.mark.parametrize(("stage", "world_size"), [(0, 2), (1, 2), (3, 1), (3, 2)])
def test_kept_first_moments_are_masked(stage: int, world_size: int, tmp_path: Path) -> None:
    check_kept_moments_are_masked(tmp_path, stage, world_size)
