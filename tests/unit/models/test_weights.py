"""Stored weights are read as transformers reads them, or refused in one line; nothing in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from das_ds.config import ModelConfig
from das_ds.errors import ModelError
from das_ds.models.loading import AUTO_CLASSES, load_model
from das_ds.models.registry import adapter_for
from helpers.odd_weights import ACCEPTED, REFUSED


def load(folder: Path, *, seed: int = 7, **options: Any) -> torch.nn.Module:
    config = ModelConfig(name_or_path=str(folder), attention="eager", **options)
    return load_model(config, seed=seed, vocab_size=100)[0]


@pytest.mark.parametrize("case", ACCEPTED)
def test_weights_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    ACCEPTED[case](tmp_path)
    auto = AUTO_CLASSES[adapter_for(AutoConfig.from_pretrained(tmp_path).model_type).objective]
    expected = auto.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    model = load(tmp_path)
    assert not model.training and not expected.training
    mine, theirs = model.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]) for name, value in mine.items())
    buffers = dict(expected.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize("case", REFUSED)
def test_weights_of_another_network_are_refused(case: str, tmp_path: Path) -> None:
    write, message = REFUSED[case]
    write(tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
