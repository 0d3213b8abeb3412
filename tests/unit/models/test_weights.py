"""Stored weights: read as by transformers, or refused with a one-line error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from das_ds.config import ModelConfig
from das_ds.errors import ModelError
from das_ds.models.architectures.registry import spec_for
from das_ds.models.loading import AUTO_CLASSES, get_weights_record, load_model, print_weights_summary
from das_ds.reporting.results import LoadedWeights
from helpers.odd_weights import ACCEPTED, REFUSED, rewritten, saved


def load(folder: Path, *, seed: int = 7, **options: Any) -> torch.nn.Module:
    config = ModelConfig(name_or_path=str(folder), attention="eager", **options)
    return load_model(config, seed=seed, vocab_size=100)[0]


@pytest.mark.parametrize("case", ACCEPTED)
def test_stored_weights_equal_transformers(case: str, tmp_path: Path) -> None:
    ACCEPTED[case](tmp_path)
    auto = AUTO_CLASSES[spec_for(AutoConfig.from_pretrained(tmp_path).model_type).objective]
    expected = auto.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    model = load(tmp_path)
    assert not model.training and not expected.training
    mine = model.state_dict()
    theirs = expected.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]) for name, value in mine.items())
    buffers = dict(expected.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize("case", REFUSED)
def test_stored_weights_of_other_network_raise(case: str, tmp_path: Path) -> None:
    write, message = REFUSED[case]
    write(tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def headless(folder: Path) -> Path:
    REFUSED["no head"][0](folder)
    return folder


def test_stored_weights_missing_head_is_random_by_seed(tmp_path: Path) -> None:
    model = load(headless(tmp_path), allow_missing=["lm_head"])
    config = ModelConfig(config=model.config.to_dict(), attention="eager")
    drawn, _ = load_model(config, seed=7, vocab_size=100)
    stored = load_file(tmp_path / "model.safetensors")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, stored[name] if name in stored else dict(drawn.named_parameters())[name]), name
    other = load(tmp_path, seed=8, allow_missing=["lm_head"])
    assert not torch.equal(other.cls.predictions.transform.dense.weight, model.cls.predictions.transform.dense.weight)


def test_stored_weights_missing_base_raises(tmp_path: Path) -> None:
    REFUSED["compiled"][0](tmp_path)
    with pytest.raises(ModelError, match=r"found no weights of bert\.embeddings"):
        load(tmp_path, allow_missing=["lm_head"])


def test_print_weights_summary_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    tensors = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): v for name, v in saved(tmp_path).items()}
    body = {name: value for name, value in tensors.items() if not name.startswith("cls.")}
    rewritten(tmp_path, {**body, "bert.pooler.dense.bias": torch.ones(24).half()})
    capfd.readouterr()
    model, _ = load_model(ModelConfig(name_or_path=str(tmp_path), allow_missing=["lm_head"]), seed=0, vocab_size=100)
    # Without the report and progress bar of transformers.
    assert capfd.readouterr() == ("", "")
    print_weights_summary(model)
    expected = (
        f"das_ds: weights of {tmp_path}: {len(body)} tensors (float32) of model.safetensors as float32; 5 renamed; "
        "1 left out: bert.pooler.dense.bias; 5 of the LM head drawn by seed (model.allow_missing: [lm_head]): cls."
        "predictions.bias, cls.predictions.transform.dense.weight, cls.predictions.transform.dense.bias and 2 more\n"
    )
    assert capfd.readouterr() == ("", expected)


def test_weights_record_is_exported_and_replaced(tmp_path: Path) -> None:
    first = load(headless(tmp_path), allow_missing=["lm_head"])
    first.save_pretrained(tmp_path / "export")
    said = json.loads((tmp_path / "export" / "config.json").read_text())["das_ds_weights"]
    assert said == get_weights_record(first) and len(said["drawn"]) == 5
    again = load(tmp_path / "export")
    record = get_weights_record(again)
    assert record is not None and record["drawn"] == [] and record["source"] == str(tmp_path / "export")
    assert LoadedWeights.model_validate(record).num_tensors == len(load_file(tmp_path / "export" / "model.safetensors"))
    random, _ = load_model(ModelConfig(config=again.config.to_dict(), attention="eager"), seed=0, vocab_size=100)
    assert get_weights_record(random) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"config": {"model_type": "bert"}, "allow_missing": ["lm_head"]}, "allow_missing: found lm_head with random"),
        ({"name_or_path": "x", "head_warmup_steps": 3}, r"found 3 without allow_missing: \[lm_head\]"),
        (
            {"name_or_path": "x", "head_warmup_steps": 3, "allow_missing": ["lm_head"], "lora": {}},
            "head_warmup_steps: found 3 with lora",
        ),
        ({"name_or_path": "x", "allow_missing": ["pooler"]}, "allow_missing.0"),
    ],
)
def test_model_config_contradicting_keys_raise(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate(values)
