"""Collators by objective, and the settings that each refuses."""

import pytest

from das_ds.config import DataConfig
from das_ds.data.objectives import CausalLMCollator, MLMCollator, build_collator
from das_ds.errors import ConfigError
from tests.helpers.tiny_tokenizer import tiny_tokenizer


def test_build_collator_by_name() -> None:
    tokenizer = tiny_tokenizer()
    assert isinstance(build_collator("clm", tokenizer, DataConfig(document_mask=True)), CausalLMCollator)
    masker = build_collator("mlm", tokenizer, DataConfig(mlm_probability=0.3))
    assert masker == MLMCollator.from_tokenizer(tokenizer, 0.3)


def test_build_collator_causal_without_mask_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    assert isinstance(build_collator("clm", tokenizer, DataConfig()), CausalLMCollator)


def test_build_collator_mlm_with_document_mask_raises() -> None:
    message = r"data.document_mask: found true with objective mlm; expected objective clm, .*allowed with mlm"
    with pytest.raises(ConfigError, match=message):
        build_collator("mlm", tiny_tokenizer(), DataConfig(document_mask=True))
