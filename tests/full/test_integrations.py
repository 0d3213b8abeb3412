"""Masks in other trainers: torch, DDP, and Hugging Face's Trainer at every stage, against das_ds's own trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.integration_checks import check_torch, check_trainer

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize("world_size", [1, 2])
def test_plain_torch_equals_own_trainer(world_size: int, tmp_path: Path) -> None:
    check_torch(tmp_path, world_size)


@pytest.mark.parametrize(
    ("zero", "world_size"),
    [
        (None, 1),
        (None, 2),
        ({"stage": 0}, 2),
        ({"stage": 1}, 2),
        ({"stage": 2}, 2),
        ({"stage": 3}, 1),
    ],
)
def test_trainer_equals_own_trainer_and_resumes(zero: dict[str, Any] | None, world_size: int, tmp_path: Path) -> None:
    check_trainer(tmp_path, world_size, zero)
