"""Every architecture under the engine: two steps of das on two ranks against one rank at ZeRO 0."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from das_ds.models.registry import ADAPTERS
from helpers.architectures import architecture_config, save_random_importance_of, train_architectures
from helpers.matrix import record
from helpers.parity import relative_difference
from helpers.run_ranks import run_ranks
from helpers.tiny_models import tiny_model

pytestmark = pytest.mark.multirank

TYPES = sorted(ADAPTERS)
FEATURES: dict[str, dict[str, Any]] = {
    "ZeRO 0": {"stage": 0},
    "ZeRO 2": {"stage": 2},
    "ZeRO 3": {"stage": 3},
    "checkpointing": {"stage": 3, "checkpointing": True},
    "bf16": {"stage": 2, "precision": "bf16"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("architectures")
    for model_type in TYPES:
        save_random_importance_of(path, model_type)
    return path


@cache
def trained(folder: Path, world_size: int, feature: str) -> dict[str, Any]:
    configs = [architecture_config(folder, t, world_size=world_size, **FEATURES[feature]) for t in TYPES]
    results: dict[str, Any] = run_ranks(train_architectures, world_size, configs, timeout=500)[0]
    return results


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("model_type", TYPES)
def test_two_ranks_train_as_one(model_type: str, feature: str, folder: Path) -> None:
    expected, expected_losses = trained(folder, 1, "ZeRO 0")[model_type]
    weights, losses = trained(folder, 2, feature)[model_type]
    start = dict(tiny_model(model_type).named_parameters())
    assert any((weights[name] - start[name]).abs().max() > 1e-3 for name in weights)
    if feature == "bf16":
        assert losses == pytest.approx(expected_losses, rel=0.05)
    else:
        assert losses == pytest.approx(expected_losses, rel=1e-5)
        assert relative_difference(weights, expected) <= 1e-5
    record(model_type, feature, "yes")
