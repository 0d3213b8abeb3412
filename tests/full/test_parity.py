"""The engine against the independent reference where the smoke tests do not: 16 bits, a long run and offload."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.parity import OFFLOAD, configs, reference, relative_difference, save_random_importance, steps
from helpers.parity_checks import (
    check_16_bits_move_with_the_reference_and_keep_full_units_still,
    check_importance_zero_is_torchs_adamw_over_100_steps,
)
from helpers.run_ranks import run_ranks
from helpers.tiny_models import NO_DROPOUT
from helpers.training import train_all

pytestmark = pytest.mark.multirank


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_random_importance(tmp_path)
    return tmp_path


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_importance_zero_is_torchs_adamw_over_100_steps(stage: int, tmp_path: Path) -> None:
    check_importance_zero_is_torchs_adamw_over_100_steps(stage, tmp_path)


@pytest.mark.parametrize(
    ("precision", "stage", "world_size"),
    [
        *(("bf16", stage, ranks) for stage, ranks in ((0, 2), (1, 2), (2, 2), (3, 1))),
        *(("fp16", stage, ranks) for stage, ranks in ((1, 2), (2, 2))),
    ],
)
def test_16_bits_move_with_the_reference_and_keep_full_units_still(
    precision: str, stage: int, world_size: int, folder: Path
) -> None:
    check_16_bits_move_with_the_reference_and_keep_full_units_still(precision, stage, world_size, folder)


@pytest.mark.parametrize("stage", [2, 3])
def test_offload_equals_the_reference(stage: int, folder: Path) -> None:
    settings = configs(folder, 2, {"stage": stage, **OFFLOAD})
    results = run_ranks(train_all, 2, settings, steps(), NO_DROPOUT)
    for setting, (weights, _) in enumerate(results[0]):
        assert relative_difference(weights, dict(reference(setting).model.named_parameters())) <= 1e-5
