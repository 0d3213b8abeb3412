"""Comparisons that `evaluate` refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from das_ds.errors import ModelError
from das_ds.training.evaluate import _check_same_tokens
from helpers.tiny_models import tiny_model
from helpers.tiny_tokenizer import word_tokenizer


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
