"""A run that is interrupted at every fifth boundary, in each of its phases, ends like an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.resume import check_a_run_in_pieces_equals_the_complete_run

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize(("stage", "precision", "asynchronous"), [(0, "fp32", True), (2, "bf16", False)])
def test_run_in_pieces_equals_uninterrupted_run(stage: int, precision: str, asynchronous: bool, tmp_path: Path) -> None:
    check_a_run_in_pieces_equals_the_complete_run(stage, "unit", precision, "adamw", asynchronous, tmp_path)
