"""Teachers and buffers at the stages and numbers of ranks that the smoke tests leave out."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.distillation_checks import check_teachers_are_exact_and_methods_equal_plain_torch

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize(("stage", "world_size"), [(0, 2), (1, 2), (2, 2), (2, 1)])
def test_teachers_are_exact_and_methods_equal_plain_torch(stage: int, world_size: int, tmp_path: Path) -> None:
    check_teachers_are_exact_and_methods_equal_plain_torch(stage, world_size, tmp_path)
