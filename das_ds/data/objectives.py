"""Batches for causal language modeling; B = rows, S = tokens per row, P = predicted tokens.

Corruption of blocks for masked language modeling; B = rows, S = tokens per row.

The two pre-training objectives as makers of batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from das_ds.config import DataConfig, ObjectiveName
from das_ds.data.batch import Batch
from das_ds.errors import ConfigError, ModelError
from das_ds.functional.sampling import mlm_corrupt, sample_generator
from das_ds.functional.token_ids import num_tokens


class CausalLMCollator:
    """Every token of a row predicts the next one; the last of the row predicts nothing. Nothing is random."""

    def batch(self, input_ids: Tensor, sample_numbers: Sequence[int], *, seed: int, stream: str) -> Batch:
        """One row per sample number; rows beyond those only fill the batch, predict nothing and get weight 0.

        Args:
            input_ids: (B, S) long, B >= len(sample_numbers).
            sample_numbers: only their number counts.
            seed: without effect; masked language modeling needs it.
            stream: without effect, as well.
        """
        num_rows, length = input_ids.shape
        positions = torch.arange(num_rows * length).view(num_rows, length)[: len(sample_numbers), :-1].flatten()
        row_weights = (torch.arange(num_rows) < len(sample_numbers)).float()
        return Batch(input_ids, input_ids, positions, input_ids.flatten()[positions + 1], row_weights)


def add_document_positions(batch: Batch, position_ids: Tensor) -> Batch:
    """The batch without predictions from one document to the next, and with the positions that keep them apart.

    Args:
        batch: of causal language modeling.
        position_ids: (B, S) long, 0 at the first token of every document and of every row.
    """
    same_document = position_ids.flatten()[batch.predicted + 1] != 0
    return replace(
        batch,
        predicted=batch.predicted[same_document],
        targets=batch.targets[same_document],
        position_ids=position_ids,
    )


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that ends each document.

    Raises:
        ModelError: the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"tokenizer of {tokenizer.name_or_path or type(tokenizer).__name__} has no end-of-text token (eos_token); "
            "causal language modeling joins documents with one (special tokens found: "
            + (", ".join(tokenizer.all_special_tokens) or "none")
            + ")"
        )
    return int(tokenizer.eos_token_id)


@dataclass(frozen=True)
class MLMCollator:
    """The facts about a tokenizer that corruption needs."""

    mask_id: int
    special_ids: tuple[int, ...]
    vocab_size: int
    probability: float
    holes: tuple[int, ...] = ()
    """Ids below `vocab_size` that no token has."""

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, probability: float) -> Self:
        """Masker that predicts tokens with the given probability.

        Raises:
            ModelError: the tokenizer has no mask token.
        """
        if tokenizer.mask_token_id is None:
            raise ModelError(
                f"tokenizer of {tokenizer.name_or_path or type(tokenizer).__name__} has no mask token; masked language "
                "modeling needs one (special tokens found: " + ", ".join(tokenizer.all_special_tokens) + ")"
            )
        vocabulary = tokenizer.get_vocab()
        vocab_size = num_tokens(vocabulary)
        holes = tuple(sorted(set(range(vocab_size)) - set(vocabulary.values())))
        return cls(tokenizer.mask_token_id, tuple(tokenizer.all_special_ids), vocab_size, probability, holes)

    @cached_property
    def _is_special(self) -> Tensor:
        is_special = torch.zeros(self.vocab_size, dtype=torch.bool)
        is_special[list(self.special_ids)] = True
        return is_special

    @cached_property
    def _ordinary_ids(self) -> Tensor:
        is_ordinary = ~self._is_special
        is_ordinary[list(self.holes)] = False
        return is_ordinary.nonzero().squeeze(1)

    def batch(self, input_ids: Tensor, sample_numbers: Sequence[int], *, seed: int, stream: str) -> Batch:
        """Corrupt one row per sample number; rows beyond those only fill the batch and get weight 0.

        Args:
            input_ids: (B, S) long, B >= len(sample_numbers).
            sample_numbers: with seed and stream, all that a row's corruption depends on.
            seed: seed of the run.
            stream: name of the use.
        """
        num_real, (num_rows, length) = len(sample_numbers), input_ids.shape
        uniforms = np.ones((2, num_rows, length))
        choices = np.zeros((num_rows, length), dtype=np.int64)
        for row, number in enumerate(sample_numbers):
            generator = sample_generator(seed, stream, number)
            uniforms[:, row] = generator.random((2, length))
            choices[row] = generator.integers(len(self._ordinary_ids), size=length)
        selection, treatment = torch.from_numpy(uniforms)
        # Rows that only fill the batch keep the selection 1, which no probability reaches.
        corrupted, predicted = mlm_corrupt(
            input_ids,
            self._is_special[input_ids],
            selection,
            treatment,
            self._ordinary_ids[torch.from_numpy(choices)],
            mask_id=self.mask_id,
            probability=self.probability,
        )
        row_weights = (torch.arange(num_rows) < num_real).float()
        positions = predicted.flatten().nonzero().squeeze(1)
        return Batch(input_ids, corrupted, positions, input_ids.flatten()[positions], row_weights)


class Collator(Protocol):
    """Decides what a row of text predicts."""

    def batch(self, input_ids: Tensor, sample_numbers: Sequence[int], *, seed: int, stream: str) -> Batch:
        """Batch of rows (B, S), of which those beyond the sample numbers predict nothing and get weight 0."""


def build_collator(name: ObjectiveName, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> Collator:
    """The objective of that name.

    Raises:
        ConfigError: documents are to be isolated in masked language modeling.
        ModelError: masked language modeling with a tokenizer without mask token.
    """
    if name == "clm":
        return CausalLMCollator()
    if data.document_mask:
        raise ConfigError(
            "data.document_mask: found true with objective mlm; expected objective clm, because the attention of "
            "masked language models is not split by document (allowed with mlm: false)"
        )
    return MLMCollator.from_tokenizer(tokenizer, data.mlm_probability)
