"""Importance of units: measured and normalized as the config says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from das_ds.config import ImportanceConfig
from das_ds.functional.importance import normalize
from das_ds.softmask import unit
from das_ds.softmask.unit import UnitImportance
from helpers.training import run_config


@pytest.mark.parametrize("kind", ["abs_grad", "squared_grad"])
def test_unit_importance_measures_configured_score(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    raw = torch.tensor([[1.0, 2.0, 6.0]])
    by_kind = {"abs_grad": raw, "squared_grad": raw**2}
    measure = lambda run, batches, loss, found: {"head": by_kind[found]}  # noqa: E731
    monkeypatch.setattr(unit, "measure_unit_importance", measure)
    settings = ImportanceConfig(score=kind)  # type: ignore[arg-type]
    run: Any = SimpleNamespace(config=run_config(tmp_path))
    domain: Any = SimpleNamespace(sample_batches=lambda label: None)
    importance = UnitImportance.measure(run, domain, "importance", None, settings)  # type: ignore[arg-type]
    assert torch.equal(importance.values["head"], normalize(by_kind[kind], settings))
