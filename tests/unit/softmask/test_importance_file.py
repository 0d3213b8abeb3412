"""Importance files: written atomically, read back exactly, refused to another model."""

from __future__ import annotations

import errno
import hashlib
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from das_ds.config import LoraConfig
from das_ds.errors import ImportanceError, RunFolderError
from das_ds.models.architectures.registry import spec_for
from das_ds.models.lora import Lora
from das_ds.models.vocabulary import reserve_embedding_rows
from das_ds.softmask import importance_file
from das_ds.softmask.importance_file import (
    link_importance,
    load_parameter_importance,
    load_unit_importance,
    save_parameter_importance,
    save_unit_importance,
)
from helpers.tiny_models import random_importance, tiny_model


def test_unit_importance_round_trip(tmp_path: Path) -> None:
    model = tiny_model()
    layout = spec_for("roberta").layout(model)
    importance = random_importance(model)
    save_unit_importance(tmp_path / "importance.safetensors", importance, layout)
    found = load_unit_importance(tmp_path / "importance.safetensors", layout)
    assert all(torch.equal(found[group], importance[group]) for group in importance)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("other", [{"model_type": "bert"}, {"intermediate_size": 44}, {"num_hidden_layers": 3}])
def test_load_unit_importance_other_model_raises(other: dict[str, object], tmp_path: Path) -> None:
    model = tiny_model()
    another = tiny_model(**other)  # type: ignore[arg-type]
    path = tmp_path / "importance.safetensors"
    save_unit_importance(path, random_importance(model), spec_for("roberta").layout(model))
    with pytest.raises(ImportanceError, match=r"another model: found roberta .*expected (bert|roberta)"):
        load_unit_importance(path, spec_for(another.config.model_type).layout(another))


def test_load_importance_fewer_tokens_fits_grown_vocabulary(tmp_path: Path) -> None:
    small = spec_for("roberta").layout(tiny_model())
    path = tmp_path / "importance.safetensors"
    weights = {name: torch.full((size,), 7, dtype=torch.uint8) for name, size in small.sizes.items()}
    save_parameter_importance(path, weights, small)
    model = tiny_model()
    reserve_embedding_rows(model, known=100, total=103)
    with load_parameter_importance(path, spec_for("roberta").layout(model)) as read:
        found = read("roberta.embeddings.word_embeddings.weight", 98 * 24, 4 * 24)
        assert found.tolist() == [7] * 2 * 24 + [0] * 2 * 24
        assert read("lm_head.bias", 101, 2).tolist() == [0, 0]
        assert read("lm_head.dense.bias", 0, 24).tolist() == [7] * 24
    # More tokens than the model has, or part of a row, or fewer rows of anything else.
    embedding = "roberta.embeddings.word_embeddings.weight"
    position = "roberta.embeddings.position_embeddings.weight"
    for name, size in ((embedding, 101 * 24), (embedding, 99 * 24 + 1), (position, 39 * 24)):
        save_parameter_importance(path, {**weights, name: torch.zeros(size, dtype=torch.uint8)}, small)
        with pytest.raises(ImportanceError, match=rf"another model.*{name}"), load_parameter_importance(path, small):
            pass


def test_load_importance_damaged_missing_foreign_files_raise(tmp_path: Path) -> None:
    layout = spec_for("roberta").layout(tiny_model())
    path = tmp_path / "importance.safetensors"
    with pytest.raises(ImportanceError, match="cannot read importance"):
        load_unit_importance(path, layout)
    path.write_bytes(b"not safetensors")
    with pytest.raises(ImportanceError, match="cannot read importance"):
        load_unit_importance(path, layout)
    save_file({"head": torch.zeros(2, 3)}, path)
    with pytest.raises(ImportanceError, match="importance format None, this version reads '4'"):
        load_unit_importance(path, layout)


def test_parameter_importance_round_trip_in_slices(tmp_path: Path) -> None:
    model = tiny_model()
    layout = spec_for("roberta").layout(model)
    importance = {
        name: torch.randint(0, 256, (weight.numel(),), dtype=torch.uint8) for name, weight in model.named_parameters()
    }
    save_parameter_importance(tmp_path / "importance.safetensors", importance, layout)
    with load_parameter_importance(tmp_path / "importance.safetensors", layout) as read:
        for name, values in importance.items():
            assert torch.equal(read(name, 0, values.numel()), values)
            assert torch.equal(read(name, 3, 5), values[3:8])
    assert len(list(tmp_path.iterdir())) == 1


def test_load_importance_other_granularity_raises(tmp_path: Path) -> None:
    model = tiny_model()
    layout = spec_for("roberta").layout(model)
    path = tmp_path / "importance.safetensors"
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


def test_load_parameter_importance_other_model_raises(tmp_path: Path) -> None:
    model = tiny_model()
    another = tiny_model(intermediate_size=44)
    path = tmp_path / "importance.safetensors"
    weights = {name: torch.zeros(weight.numel(), dtype=torch.uint8) for name, weight in model.named_parameters()}
    save_parameter_importance(path, weights, spec_for("roberta").layout(model))
    layout = spec_for("roberta").layout(another)
    with (
        pytest.raises(ImportanceError, match=r"layer\.0\.intermediate\.dense\.weight: \(960,\).*\(1056,\)"),
        load_parameter_importance(path, layout),
    ):
        pass


def save_any(kind: str, path: Path, tokens: tuple[str, ...] = (), model: Any = None) -> None:
    model = tiny_model() if model is None else model
    layout = spec_for("roberta").layout(model)
    if kind == "unit":
        save_unit_importance(path, random_importance(model), layout, tokens)
    else:
        weights = {name: torch.zeros(size, dtype=torch.uint8) for name, size in layout.sizes.items()}
        save_parameter_importance(path, weights, layout, tokens)


def load_any(kind: str, path: Path, tokens: tuple[str, ...], layout: Any = None) -> None:
    layout = spec_for("roberta").layout(tiny_model()) if layout is None else layout
    if kind == "unit":
        load_unit_importance(path, layout, tokens)
    else:
        with load_parameter_importance(path, layout, tokens):
            pass


@pytest.mark.parametrize("kind", ["unit", "parameter"])
def test_load_importance_other_tokenizer_raises(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "importance.safetensors"
    tokens = ("<s>", "bread", "soup")
    save_any(kind, path, tokens)
    load_any(kind, path, tokens)
    load_any(kind, path, (*tokens, "treebank"))
    for others in (("<s>", "soup", "bread"), ("<s>", "bread"), ("<s>", "bread", "menu", "treebank")):
        message = rf"{path}: importance of another tokenizer: found 3 tokens, expected the first of .* {len(others)} in"
        with pytest.raises(ImportanceError, match=message):
            load_any(kind, path, others)


@pytest.mark.parametrize("kind", ["unit", "parameter"])
def test_load_importance_other_layers_or_table_raises(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "importance.safetensors"
    layout = spec_for("roberta").layout(tiny_model())
    save_any(kind, path)
    reversed_layers = [replace(item, layer=layout.num_layers - 1 - item.layer) for item in layout.ownerships]
    other_units = [replace(item, units=item.units.flip(0)) for item in layout.ownerships]
    fewer = layout.ownerships[1:]
    for ownerships in (reversed_layers, other_units, fewer):
        with pytest.raises(ImportanceError, match=r"importance of another table of units: found layers or units"):
            load_any(kind, path, (), replace(layout, ownerships=tuple(ownerships)))
    # The order of the rules of a table has no meaning.
    load_any(kind, path, (), replace(layout, ownerships=tuple(reversed(layout.ownerships))))


def test_checksum_covers_complete_tensors_without_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance_file, "CHUNK_BYTES", 1000)
    tensors = {"b": torch.randn(2**20), "a": torch.arange(7, dtype=torch.uint8)}
    expected = hashlib.sha256(b"a" + bytes(range(7)) + b"b" + tensors["b"].numpy().tobytes()).hexdigest()
    tracemalloc.start()
    try:
        found = importance_file._digest(tensors, tensors.__getitem__)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == expected
    assert peak < 2**20


def test_link_importance_links_or_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tmp_path / "domain" / "importance.safetensors"
    second = tmp_path / "importance.safetensors"
    save_any("unit", first)
    for _ in range(2):
        link_importance(first, second)
        assert second.samefile(first)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [second.name]
    # Rewriting a file does not change the one of the other name.
    content = first.read_bytes()
    save_any("unit", second, tokens=("<s>",))
    assert first.read_bytes() == content != second.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    link_importance(first, second)
    assert not second.samefile(first) and second.read_bytes() == content


def test_save_importance_full_disk_keeps_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "importance.safetensors"
    save_any("unit", path)
    content = path.read_bytes()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(importance_file, "save_file", refuse)
    with pytest.raises(RunFolderError, match=rf"{path}: cannot be written \(.*No space left .*must have free space"):
        save_any("unit", path)
    assert path.read_bytes() == content and len(list(tmp_path.iterdir())) == 1


def test_unit_importance_serves_network_and_adapters(tmp_path: Path) -> None:
    """With LoRA the same heads and neurons are protected, by masks on other weights."""
    model = tiny_model()
    layout = spec_for("roberta").layout(model)
    adapted = Lora.plan(model, layout, LoraConfig(rank=2)).layout(layout)
    importance = random_importance(model)
    for written, read in ((layout, adapted), (adapted, layout)):
        path = tmp_path / "importance.safetensors"
        save_unit_importance(path, importance, written)
        found = load_unit_importance(path, read)
        assert all(found[group].equal(values) for group, values in importance.items())
