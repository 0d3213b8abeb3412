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
ALONE, ALONE_WITH_LORA = "one rank", "one rank, LoRA"
LORA = {"rank": 2, "alpha": 8.0}
SETTINGS: dict[str, dict[str, Any]] = {
    ALONE: {"zero": {"stage": 0}},
    ALONE_WITH_LORA: {"zero": {"stage": 0}, "lora": LORA},
    "ZeRO 0": {"zero": {"stage": 0}},
    "ZeRO 2": {"zero": {"stage": 2}},
    "ZeRO 3": {"zero": {"stage": 3}},
    "checkpointing": {"zero": {"stage": 3}, "gradient_checkpointing": True},
    "bf16": {"zero": {"stage": 2}, "precision": "bf16"},
    "LoRA": {"zero": {"stage": 2}, "lora": LORA},
}
FEATURES = tuple(name for name in SETTINGS if name not in (ALONE, ALONE_WITH_LORA))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("architectures")
    for model_type in TYPES:
        save_random_importance_of(path, model_type)
    return path


@cache
def trained(folder: Path, world_size: int, setting: str) -> dict[str, Any]:
    configs = [architecture_config(folder, t, world_size=world_size, **SETTINGS[setting]) for t in TYPES]
    results: dict[str, Any] = run_ranks(train_architectures, world_size, configs, timeout=500)[0]
    return results


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("model_type", TYPES)
def test_two_ranks_train_as_one(model_type: str, feature: str, folder: Path) -> None:
    expected, expected_losses = trained(folder, 1, ALONE_WITH_LORA if feature == "LoRA" else ALONE)[model_type]
    weights, losses = trained(folder, 2, feature)[model_type]
    start = dict(tiny_model(model_type).named_parameters())
    # Only the adapters are trained under LoRA; B begins at zero.
    moved = {n: w - start[n] if n in start else w for n, w in weights.items() if "lora_A" not in n}
    assert any(change.abs().max() > 1e-3 for change in moved.values())
    assert (feature == "LoRA") == all("lora" in name for name in weights)
    if feature == "bf16":
        assert losses == pytest.approx(expected_losses, rel=0.05)
    else:
        assert losses == pytest.approx(expected_losses, rel=1e-5)
        # A gets no gradient while B is 0, and so little after that that rounding shows.
        assert relative_difference(weights, expected) <= (1e-4 if feature == "LoRA" else 1e-5)
    record(model_type, feature, "yes")
