"""The two pre-training objectives as makers of batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from das_ds.config import DataConfig, ObjectiveName
from das_ds.data.batches import Batch
from das_ds.data.causal import NextTokens
from das_ds.data.masking import MlmMasker
from das_ds.errors import ConfigError


class Objective(Protocol):
    """Decides what a row of text predicts."""

    def batch(self, input_ids: Tensor, sample_numbers: Sequence[int], *, seed: int, stream: str) -> Batch:
        """Batch of rows (B, S), of which those beyond the sample numbers predict nothing and get weight 0."""


def make_objective(name: ObjectiveName, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> Objective:
    """The objective of that name.

    Raises:
        ConfigError: documents are to be isolated in masked language modelling.
        ModelError: masked language modelling with a tokeniser without mask token.
    """
    if name == "clm":
        return NextTokens()
    if data.isolate_documents:
        raise ConfigError(
            "data.isolate_documents: found true with objective mlm; expected objective clm, because the attention of "
            "masked language models is not split by document (allowed with mlm: false)"
        )
    return MlmMasker.from_tokenizer(tokenizer, data.mlm_probability)
