"""Moments of inputs on one to three ranks at every ZeRO stage against float64."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.moment_checks import check_moments

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_moments_equal_float64_at_owners_only(world_size: int, stage: int, tmp_path: Path) -> None:
    check_moments(tmp_path, world_size, stage)
