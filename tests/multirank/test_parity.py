"""The engine at every ZeRO stage and number of ranks against the independent single-process reference."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

from helpers.parity import (
    OFFLOAD,
    SETTINGS,
    configs,
    reference,
    relative_difference,
    save_random_importance,
    steps,
)
from helpers.run_ranks import run_ranks
from helpers.tiny_models import NO_DROPOUT, tiny_model
from helpers.training import train_all


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_random_importance(tmp_path)
    return tmp_path


@pytest.mark.multirank
@pytest.mark.parametrize(("stage", "world_size"), list(product(range(4), (1, 2))))
def test_weights_after_five_steps_equal_the_reference(stage: int, world_size: int, folder: Path) -> None:
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
@pytest.mark.parametrize("stage", [2, 3])
def test_offload_equals_the_reference(stage: int, folder: Path) -> None:
    settings = configs(folder, 2, {"stage": stage, **OFFLOAD})
    results = run_ranks(train_all, 2, settings, steps(), NO_DROPOUT)
    for setting, (weights, _) in enumerate(results[0]):
        assert relative_difference(weights, dict(reference(setting).model.named_parameters())) <= 1e-5


@pytest.mark.multirank
@pytest.mark.parametrize(("stage", "world_size"), [(0, 2), (1, 2), (2, 2), (3, 1), (3, 2)])
def test_bf16_moves_with_the_reference_and_keeps_full_units_still(stage: int, world_size: int, folder: Path) -> None:
    settings = configs(folder, world_size, {"stage": stage}, precision="bf16")
    results = run_ranks(train_all, world_size, settings, steps(), NO_DROPOUT)
    start = {name: weight.detach() for name, weight in tiny_model().named_parameters()}
    layer = "roberta.encoder.layer.1"
    for setting, (weights, lines) in enumerate(results[0]):
        expected = reference(setting)
        assert [line["loss/mlm"] for line in lines] == pytest.approx(expected.mlm_losses, rel=0.03)
        assert all(weight.dtype == torch.float32 for weight in weights.values())
        # The last intermediate unit of layer 1 has importance 1 and must not move at all, not even by weight decay ...
        moved = weights[f"{layer}.intermediate.dense.weight"] - start[f"{layer}.intermediate.dense.weight"]
        if SETTINGS[setting]["apply_to"] == "update":
            assert torch.equal(moved[-1], torch.zeros_like(moved[-1]))
        # ... and all others move as in float64, but for what 8 bits of gradient lose.
        found = torch.cat([(weights[n] - start[n]).flatten() for n in weights if "key.bias" not in n])
        true = torch.cat(
            [(w - start[n]).flatten() for n, w in expected.model.named_parameters() if "key.bias" not in n]
        )
        assert torch.nn.functional.cosine_similarity(found, true.float(), dim=0) > 0.97


@pytest.mark.multirank
def test_activation_checkpointing_changes_nothing(folder: Path) -> None:
    settings = configs(folder, 2, {"stage": 3})
    checkpointed = [
        config.model_copy(update={"model": config.model.model_copy(update={"gradient_checkpointing": True})})
        for config in settings
    ]
    results = run_ranks(train_all, 2, checkpointed, steps(), NO_DROPOUT)
    for setting, (weights, _) in enumerate(results[0]):
        assert relative_difference(weights, dict(reference(setting).model.named_parameters())) <= 1e-5
