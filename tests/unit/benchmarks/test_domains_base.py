"""The base models: only the head is trained, results are cached by content, and the decoder is causal."""

import lzma
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BertForMaskedLM

from benchmarks.domains import base
from benchmarks.domains.base import (
    HeadTraining,
    base_decoder,
    base_encoder,
    general_text,
    learning_rate_factor,
    log_frequencies,
    predicted_states,
)
from das_ds.config import ModelConfig
from das_ds.errors import ModelError
from das_ds.models.loading import find_spec
from helpers.tiny_models import tiny_model
from helpers.tiny_tokenizer import TEXT, tiny_tokenizer

TRAINING = HeadTraining(batches=6, epochs=5, batch_size=4, sequence_length=16, learning_rate=1e-2)


@pytest.fixture
def body(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small body without a head in the place of the packaged one, and a general corpus in `data`."""
    folder = tmp_path / "body"
    tiny_model("bert", vocab_size=len(tiny_tokenizer())).bert.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (tmp_path / "data" / "general").mkdir(parents=True)
    for part in ("train", "valid"):
        (tmp_path / "data" / "general" / f"{part}.txt.xz").write_bytes(lzma.compress(TEXT.encode()))
    monkeypatch.setattr(base, "packaged_body", lambda: folder)
    return folder


def trained(folder: Path, training: HeadTraining) -> Path:
    return base_encoder(folder / "base", folder / "data", folder / "cache", training, torch.device("cpu"))


@torch.no_grad()
def loss(folder: Path, path: Path) -> float:
    """Of masked tokens of the corpus."""
    text = general_text(folder / "body", folder / "data", folder / "cache", TRAINING, torch.device("cpu"))
    model = BertForMaskedLM.from_pretrained(path).eval()
    hidden, targets = (torch.cat(parts) for parts in zip(*predicted_states(model, text), strict=True))
    return float(cross_entropy(model.cls(hidden), targets))


def test_base_encoder_only_the_head_is_trained(tmp_path: Path, body: Path) -> None:
    path = trained(tmp_path, TRAINING)
    before, after = (BertForMaskedLM.from_pretrained(folder) for folder in (body, path))
    for (name, old), new in zip(before.bert.named_parameters(), after.bert.parameters(), strict=True):
        assert torch.equal(old, new), name
    assert loss(tmp_path, path) < loss(tmp_path, trained(tmp_path, replace(TRAINING, learning_rate=1e-9))) - 0.1


def test_base_encoder_is_cached_by_content_and_settings(
    tmp_path: Path, body: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained(tmp_path, TRAINING)
    weights = (first / "model.safetensors").read_bytes()
    again = base_encoder(tmp_path / "again", tmp_path / "data", tmp_path / "cache", TRAINING, torch.device("cpu"))
    assert again.name == first.name and (again / "model.safetensors").read_bytes() == weights
    assert trained(tmp_path, replace(TRAINING, seed=1)) != first
    monkeypatch.setattr(base, "train_head", None)
    assert trained(tmp_path, TRAINING) == first


def test_base_decoder_has_the_weights_of_the_encoder_and_sees_no_later_tokens(tmp_path: Path, body: Path) -> None:
    encoder = trained(tmp_path, TRAINING)
    path = base_decoder(encoder)
    assert base_decoder(encoder) == path != encoder
    assert (path / "model.safetensors").read_bytes() == (encoder / "model.safetensors").read_bytes()
    config = ModelConfig(name_or_path=str(path))
    assert (find_spec(config).objective, find_spec(ModelConfig(name_or_path=str(encoder))).objective) == ("clm", "mlm")
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokens = torch.arange(5, 21).view(1, 16)
    changed = tokens.clone()
    changed[0, 9:] += 1
    with torch.no_grad():
        first, second = (model(input_ids=ids).logits[0] for ids in (tokens, changed))
    torch.testing.assert_close(first[:9], second[:9], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(first[9:], second[9:], atol=1e-3)


def test_packaged_body_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "PACKAGE", "gt_no_such_package")
    with pytest.raises(ModelError, match=r"package gt-no-such-package is not installed, expected it next to das_ds"):
        base.packaged_body()


def test_log_frequencies_are_smoothed() -> None:
    probabilities = log_frequencies(torch.tensor([2, 2, 0]), 3).exp()
    assert probabilities.tolist() == pytest.approx([1.1 / 3.3, 0.1 / 3.3, 2.1 / 3.3])


def test_learning_rate_factor_warms_up_and_decays() -> None:
    factors = [learning_rate_factor(step, 200) for step in range(200)]
    assert factors[0] == 1 / 20 and factors[-1] == 1 / 200
    assert max(factors) == factors[18] == pytest.approx(182 / 200)
