"""Collators: rows of tokens to micro-batches for masked (MLM) and causal (CLM) language modeling.

Shape legend: B rows, S tokens per row, P predicted tokens.
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


class Collator(Protocol):
    """Decides which positions of a row predict which tokens."""

    def __call__(self, input_ids: Tensor, sample_numbers: Sequence[int], *, seed: int, stream: str) -> Batch:
        """One row per sample number; rows beyond those are padding rows: they predict nothing and have weight 0.

        Args:
            input_ids: (B, S) long, B >= len(sample_numbers).
            sample_numbers: with seed and stream, everything that a row's corruption depends on.
            seed: seed of the run.
            stream: name of the use, such as `train/<domain>`.
        """


def build_collator(name: ObjectiveName, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> Collator:
    """The collator of an objective.

    Raises:
        ConfigError: a document mask in masked language modeling.
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


@dataclass(frozen=True)
class MLMCollator:
    """Masked language modeling with BERT's corruption, see `functional.sampling.mlm_corrupt`."""

    mask_id: int
    special_ids: tuple[int, ...]
    vocab_size: int
    probability: float
    """Probability that a token is predicted."""
    holes: tuple[int, ...] = ()
    """Ids below `vocab_size` that no token has."""

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, probability: float) -> Self:
        """The collator for a tokenizer's ids.

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
        """(vocab_size,) bool."""
        is_special = torch.zeros(self.vocab_size, dtype=torch.bool)
        is_special[list(self.special_ids)] = True
        return is_special

    @cached_property
    def _ordinary_ids(self) -> Tensor:
        """Ids that may replace a token: neither special nor holes."""
        is_ordinary = ~self._is_special
        is_ordinary[list(self.holes)] = False
        return is_ordinary.nonzero().squeeze(1)

    def __call__(self, input_ids: Tensor, sample_numbers: Sequence[int], *, seed: int, stream: str) -> Batch:
        """See `Collator`."""
        num_rows, length = input_ids.shape
        # Padding rows keep the uniform 1, which no probability reaches, and are never corrupted.
        uniforms = np.ones((2, num_rows, length))
        choices = np.zeros((num_rows, length), dtype=np.int64)
        for row, number in enumerate(sample_numbers):
            # One generator per sample, so that its corruption does not depend on the batch that it is in.
            generator = sample_generator(seed, stream, number)
            uniforms[:, row] = generator.random((2, length))
            choices[row] = generator.integers(len(self._ordinary_ids), size=length)
        selection, treatment = torch.from_numpy(uniforms)
        corrupted, is_predicted = mlm_corrupt(
            input_ids,
            self._is_special[input_ids],
            selection,
            treatment,
            self._ordinary_ids[torch.from_numpy(choices)],
            mask_id=self.mask_id,
            probability=self.probability,
        )
        predicted = is_predicted.flatten().nonzero().squeeze(1)
        return Batch(
            input_ids=input_ids,
            corrupted_ids=corrupted,
            predicted=predicted,
            targets=input_ids.flatten()[predicted],
            row_weights=_row_weights(num_rows, len(sample_numbers)),
        )


class CausalLMCollator:
    """Causal language modeling: every token of a row predicts the next one. Nothing is random."""

    def __call__(self, input_ids: Tensor, sample_numbers: Sequence[int], *, seed: int, stream: str) -> Batch:
        """See `Collator`; only the number of sample numbers counts, seed and stream are unused."""
        num_rows, length = input_ids.shape
        positions = torch.arange(num_rows * length).view(num_rows, length)
        # The last token of a row predicts nothing: its successor is in another row.
        predicted = positions[: len(sample_numbers), :-1].flatten()
        return Batch(
            input_ids=input_ids,
            corrupted_ids=input_ids,
            predicted=predicted,
            targets=input_ids.flatten()[predicted + 1],
            row_weights=_row_weights(num_rows, len(sample_numbers)),
        )


def add_document_positions(batch: Batch, position_ids: Tensor) -> Batch:
    """Mask documents from each other in a causal batch: no prediction across documents, positions that restart.

    Args:
        batch: of causal language modeling.
        position_ids: (B, S) long, 0 at the first token of every document and of every row.
    """
    # The successor of a document's last token has position 0.
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


def _row_weights(num_rows: int, num_samples: int) -> Tensor:
    """(num_rows,) float32: 1 for samples, then 0 for padding rows."""
    return (torch.arange(num_rows) < num_samples).float()
