"""What masks leave of each input, on one to three ranks at every ZeRO stage, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.plasticity_checks import check_plasticity

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_plasticity_equals_float64(world_size: int, stage: int, tmp_path: Path) -> None:
    check_plasticity(tmp_path, world_size, stage)
