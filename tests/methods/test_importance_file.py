"""Importance files: written whole, read back exactly, refused to another model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from das_ds.errors import ImportanceError
from das_ds.methods.importance_file import load_importance, save_importance
from das_ds.models.registry import adapter_for
from helpers.tiny_models import random_importance, tiny_model


def test_round_trip(tmp_path: Path) -> None:
    model = tiny_model()
    layout, importance = adapter_for("roberta").layout(model), random_importance(model)
    save_importance(tmp_path / "importance.safetensors", importance, layout)
    found = load_importance(tmp_path / "importance.safetensors", layout)
    assert all(torch.equal(found[group], importance[group]) for group in importance)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("other", [{"model_type": "bert"}, {"intermediate_size": 44}, {"num_hidden_layers": 3}])
def test_importance_of_another_model_is_refused(other: dict[str, object], tmp_path: Path) -> None:
    model, another = tiny_model(), tiny_model(**other)  # type: ignore[arg-type]
    path = tmp_path / "importance.safetensors"
    save_importance(path, random_importance(model), adapter_for("roberta").layout(model))
    with pytest.raises(ImportanceError, match=r"another model: found roberta .*expected (bert|roberta)"):
        load_importance(path, adapter_for(another.config.model_type).layout(another))


def test_damaged_missing_and_foreign_files(tmp_path: Path) -> None:
    layout = adapter_for("roberta").layout(tiny_model())
    path = tmp_path / "importance.safetensors"
    with pytest.raises(ImportanceError, match="cannot read importance"):
        load_importance(path, layout)
    path.write_bytes(b"not safetensors")
    with pytest.raises(ImportanceError, match="cannot read importance"):
        load_importance(path, layout)
    save_file({"head": torch.zeros(2, 3)}, path)
    with pytest.raises(ImportanceError, match="importance format None, this version reads '1'"):
        load_importance(path, layout)
