"""Comparisons that `evaluate` refuses, and bits per byte."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from das_ds.errors import ConfigError, ModelError
from das_ds.models.loading import open_tokenizer
from das_ds.training.evaluate import _check_same_tokens, evaluate_model
from helpers.single_rank import SingleRank
from helpers.tiny_models import tiny_model
from helpers.tiny_tokenizer import word_tokenizer
from helpers.training import run_config


def test_evaluate_model_with_other_token_ids_raises(tmp_path: Path) -> None:
    word_tokenizer(["soup", "bread"]).save_pretrained(tmp_path)
    _check_same_tokens(word_tokenizer(["soup", "bread"]).get_vocab(), tmp_path)
    # As after a run that added tokens.
    _check_same_tokens(word_tokenizer(["soup"]).get_vocab(), tmp_path)
    with pytest.raises(ModelError) as caught:
        _check_same_tokens(word_tokenizer(["bread", "soup"]).get_vocab(), tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: the model's tokenizer gives other ids than that of the config (data.tokenizer or "
        "model.name_or_path): found 6 for 'bread', expected 5"
    )
    with pytest.raises(ModelError, match="found None for 'menu', expected 7"):
        _check_same_tokens(word_tokenizer(["soup", "bread", "menu", "price"]).get_vocab(), tmp_path)


def test_evaluate_model_without_tokenizer_uses_config(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    _check_same_tokens(word_tokenizer(["soup"]).get_vocab(), tmp_path)


def test_bits_per_byte_of_a_masked_language_model_are_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    ranks: Any = SingleRank()
    with pytest.raises(ConfigError, match=r"^--bits-per-byte: found objective mlm, whose loss .*; allowed: clm$"):
        evaluate_model(run_config(tmp_path / "run"), ranks, tmp_path, in_bits_per_byte=True)


def test_bits_per_byte_are_the_code_length_of_the_text(tmp_path: Path) -> None:
    """A model whose logits are all equal needs log2(V) bits for each token, of one letter and a space."""
    word_tokenizer(list("abcdefgh")).save_pretrained(tmp_path)
    model = tiny_model("llama", vocab_size=13)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    model.save_pretrained(tmp_path)
    text = " ".join("abcdefgh" * 20)
    (tmp_path / "letters.txt").write_text(f"{text}\n")
    config = run_config(
        tmp_path / "run",
        domains=[{"name": "letters", "train": [str(tmp_path / "letters.txt")], "valid_fraction": 0.5}],
        data={"tokenizer": str(tmp_path), "cache_dir": str(tmp_path / "cache")},
    )
    ranks: Any = SingleRank()
    nats = evaluate_model(config, ranks, tmp_path)["letters"]
    assert nats == pytest.approx(math.log(13))
    # 160 tokens and those that the tokenizer puts around them.
    num_tokens = len(open_tokenizer(str(tmp_path))(text)["input_ids"])
    bits = evaluate_model(config, ranks, tmp_path, in_bits_per_byte=True)["letters"]
    assert bits == pytest.approx(math.log2(13) * num_tokens / len(text.encode()))
