"""Stored weights at ZeRO 3: read and refused as at the other stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from das_ds.config import ModelConfig
from das_ds.errors import ModelError
from das_ds.models.loading import load_model
from helpers.odd_weights import ACCEPTED, REFUSED, Tensors, loaded_in_parts
from helpers.run_ranks import run_ranks

pytestmark = pytest.mark.multirank


def full(folder: Path, **options: object) -> Tensors | str:
    config = ModelConfig.model_validate({"name_or_path": str(folder), "attention": "eager", **options})
    try:
        model, _ = load_model(config, seed=7, vocab_size=100)
    except ModelError as error:
        return str(error)
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def folders(root: Path, cases: list[str]) -> dict[str, Path]:
    writers = {**ACCEPTED, **{name: write for name, (write, _) in REFUSED.items()}}
    paths = {name: root / str(number) for number, name in enumerate(cases)}
    for name, path in paths.items():
        path.mkdir()
        writers[name](path)
    return paths


def check(expected: dict[str, Tensors | str], found: dict[str, Tensors | str]) -> None:
    different = []
    for name, mine in expected.items():
        parts = found[name]
        if isinstance(mine, str) or isinstance(parts, str):
            same = mine == parts
        else:
            same = mine.keys() == parts.keys() and all(torch.equal(value, parts[key]) for key, value in mine.items())
        if not same:
            different.append(name)
    assert different == []


def test_stored_weights_zero3_equal_other_stages(tmp_path: Path) -> None:
    paths = folders(tmp_path, [*ACCEPTED, *REFUSED])
    expected = {name: full(path) for name, path in paths.items()}
    assert {name for name, found in expected.items() if isinstance(found, str)} == REFUSED.keys()
    for found in run_ranks(loaded_in_parts, 2, paths):
        check(expected, found)


def test_stored_weights_missing_head_is_random_by_seed_at_every_stage(tmp_path: Path) -> None:
    paths = folders(tmp_path, ["no head", "half a head", "no head of a decoder"])
    expected = {name: full(path, allow_missing=["lm_head"]) for name, path in paths.items()}
    again = {name: full(path, allow_missing=["lm_head"]) for name, path in paths.items()}
    check(expected, again)
    for found in run_ranks(loaded_in_parts, 2, paths, ["lm_head"]):
        check(expected, found)
