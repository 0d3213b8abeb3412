"""The engine at every ZeRO stage and number of ranks against the independent single-process reference."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from helpers.parity import (
    SETTINGS,
    configs,
    reference,
    relative_difference,
    save_random_importance,
    steps,
)
from helpers.parity_checks import (
    check_16_bits_move_with_the_reference_and_keep_full_units_still,
    check_importance_zero_is_torchs_adamw_over_100_steps,
)
from helpers.run_ranks import run_ranks
from helpers.tiny_models import NO_DROPOUT
from helpers.training import train_all


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_random_importance(tmp_path)
    return tmp_path


@pytest.mark.multirank
@pytest.mark.parametrize(("stage", "world_size"), list(product(range(4), (1, 2))))
def test_das_five_steps_equal_reference(stage: int, world_size: int, folder: Path) -> None:
    settings = configs(folder, world_size, {"stage": stage})
    results = run_ranks(train_all, world_size, settings, steps(), NO_DROPOUT)
    for setting, (weights, lines) in enumerate(results[0]):
        expected = reference(setting)
        difference = relative_difference(weights, dict(expected.model.named_parameters()))
        print(f"parity stage {stage} ranks {world_size} {SETTINGS[setting]}: {difference:.2e}")
        assert difference <= 1e-5
        assert [line["loss/mlm"] for line in lines] == pytest.approx(expected.mlm_losses, rel=1e-5)
        assert [line["loss/contrast"] for line in lines] == pytest.approx(expected.contrast_losses, rel=1e-4)
        assert [line["grad_norm"] for line in lines] == pytest.approx(expected.grad_norms, rel=1e-4)


@pytest.mark.multirank
def test_das_activation_checkpointing_changes_nothing(folder: Path) -> None:
    settings = configs(folder, 2, {"stage": 3})
    checkpointed = [
        config.model_copy(update={"model": config.model.model_copy(update={"gradient_checkpointing": True})})
        for config in settings
    ]
    results = run_ranks(train_all, 2, checkpointed, steps(), NO_DROPOUT)
    for setting, (weights, _) in enumerate(results[0]):
        assert relative_difference(weights, dict(reference(setting).model.named_parameters())) <= 1e-5


@pytest.mark.multirank
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_das_16_bits_stage_3_follow_reference(precision: str, folder: Path) -> None:
    check_16_bits_move_with_the_reference_and_keep_full_units_still(precision, 3, 2, folder)


@pytest.mark.multirank
def test_das_zero_importance_equals_torch_adamw(tmp_path: Path) -> None:
    check_importance_zero_is_torchs_adamw_over_100_steps(2, tmp_path)
