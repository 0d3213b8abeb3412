"""Importance files: written whole, read back exactly, refused to another model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from das_ds.errors import ImportanceError
from das_ds.methods.importance_file import (
    load_parameter_importance,
    load_unit_importance,
    save_parameter_importance,
    save_unit_importance,
)
from das_ds.models.registry import adapter_for
from das_ds.models.vocabulary import reserve_rows
from helpers.tiny_models import random_importance, tiny_model


def test_round_trip(tmp_path: Path) -> None:
    model = tiny_model()
    layout, importance = adapter_for("roberta").layout(model), random_importance(model)
    save_unit_importance(tmp_path / "importance.safetensors", importance, layout)
    found = load_unit_importance(tmp_path / "importance.safetensors", layout)
    assert all(torch.equal(found[group], importance[group]) for group in importance)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("other", [{"model_type": "bert"}, {"intermediate_size": 44}, {"num_hidden_layers": 3}])
def test_importance_of_another_model_is_refused(other: dict[str, object], tmp_path: Path) -> None:
    model, another = tiny_model(), tiny_model(**other)  # type: ignore[arg-type]
    path = tmp_path / "importance.safetensors"
    save_unit_importance(path, random_importance(model), adapter_for("roberta").layout(model))
    with pytest.raises(ImportanceError, match=r"another model: found roberta .*expected (bert|roberta)"):
        load_unit_importance(path, adapter_for(another.config.model_type).layout(another))


def test_importance_of_fewer_tokens_fits_a_grown_vocabulary(tmp_path: Path) -> None:
    small, path = adapter_for("roberta").layout(tiny_model()), tmp_path / "importance.safetensors"
    weights = {name: torch.full((size,), 7, dtype=torch.uint8) for name, size in small.sizes.items()}
    save_parameter_importance(path, weights, small)
    model = tiny_model()
    reserve_rows(model, known=100, total=103)
    with load_parameter_importance(path, adapter_for("roberta").layout(model)) as read:
        found = read("roberta.embeddings.word_embeddings.weight", 98 * 24, 4 * 24)
        assert found.tolist() == [7] * 2 * 24 + [0] * 2 * 24
        assert read("lm_head.bias", 101, 2).tolist() == [0, 0]
        assert read("lm_head.dense.bias", 0, 24).tolist() == [7] * 24
    # More tokens than the model has, or part of a row, or fewer rows of anything else.
    embedding, position = "roberta.embeddings.word_embeddings.weight", "roberta.embeddings.position_embeddings.weight"
    for name, size in ((embedding, 101 * 24), (embedding, 99 * 24 + 1), (position, 39 * 24)):
        save_parameter_importance(path, {**weights, name: torch.zeros(size, dtype=torch.uint8)}, small)
        with pytest.raises(ImportanceError, match=rf"another model.*{name}"), load_parameter_importance(path, small):
            pass


def test_damaged_missing_and_foreign_files(tmp_path: Path) -> None:
    layout = adapter_for("roberta").layout(tiny_model())
    path = tmp_path / "importance.safetensors"
    with pytest.raises(ImportanceError, match="cannot read importance"):
        load_unit_importance(path, layout)
    path.write_bytes(b"not safetensors")
    with pytest.raises(ImportanceError, match="cannot read importance"):
        load_unit_importance(path, layout)
    save_file({"head": torch.zeros(2, 3)}, path)
    with pytest.raises(ImportanceError, match="importance format None, this version reads '3'"):
        load_unit_importance(path, layout)


def test_weights_round_trip_in_stretches(tmp_path: Path) -> None:
    model = tiny_model()
    layout = adapter_for("roberta").layout(model)
    importance = {
        name: torch.randint(0, 256, (weight.numel(),), dtype=torch.uint8) for name, weight in model.named_parameters()
    }
    save_parameter_importance(tmp_path / "importance.safetensors", importance, layout)
    with load_parameter_importance(tmp_path / "importance.safetensors", layout) as stretch:
        for name, values in importance.items():
            assert torch.equal(stretch(name, 0, values.numel()), values)
            assert torch.equal(stretch(name, 3, 5), values[3:8])
    assert len(list(tmp_path.iterdir())) == 1


def test_importance_of_another_granularity_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    layout, path = adapter_for("roberta").layout(model), tmp_path / "importance.safetensors"
    save_unit_importance(path, random_importance(model), layout)
    with (
        pytest.raises(ImportanceError, match="by unit, expected by parameter"),
        load_parameter_importance(path, layout),
    ):
        pass
    weights = {name: torch.zeros(weight.numel(), dtype=torch.uint8) for name, weight in model.named_parameters()}
    save_parameter_importance(path, weights, layout)
    with pytest.raises(ImportanceError, match="by parameter, expected by unit"):
        load_unit_importance(path, layout)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    model, another = tiny_model(), tiny_model(intermediate_size=44)
    path = tmp_path / "importance.safetensors"
    weights = {name: torch.zeros(weight.numel(), dtype=torch.uint8) for name, weight in model.named_parameters()}
    save_parameter_importance(path, weights, adapter_for("roberta").layout(model))
    layout = adapter_for("roberta").layout(another)
    with (
        pytest.raises(ImportanceError, match=r"layer\.0\.intermediate\.dense\.weight: \(960,\).*\(1056,\)"),
        load_parameter_importance(path, layout),
    ):
        pass
