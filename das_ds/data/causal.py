"""Batches for causal language modelling; B = rows, S = tokens per row, P = predicted tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from das_ds.data.batches import Batch
from das_ds.errors import ModelError


class NextTokens:
    """Every token of a row predicts the next one; the last of the row predicts nothing. Nothing is random."""

    def batch(self, input_ids: Tensor, sample_numbers: Sequence[int], *, seed: int, stream: str) -> Batch:
        """One row per sample number; rows beyond those only fill the batch, predict nothing and get weight 0.

        Args:
            input_ids: (B, S) long, B >= len(sample_numbers).
            sample_numbers: only their number counts.
            seed: without effect; masked language modelling needs it.
            stream: without effect, as well.
        """
        num_rows, length = input_ids.shape
        positions = torch.arange(num_rows * length).view(num_rows, length)[: len(sample_numbers), :-1].flatten()
        row_weights = (torch.arange(num_rows) < len(sample_numbers)).float()
        return Batch(input_ids, input_ids, positions, input_ids.flatten()[positions + 1], row_weights)


def isolated(batch: Batch, position_ids: Tensor) -> Batch:
    """The batch without predictions from one document to the next, and with the positions that keep them apart.

    Args:
        batch: of causal language modelling.
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
        ModelError: the tokeniser has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"tokeniser of {tokenizer.name_or_path or type(tokenizer).__name__} has no end-of-text token (eos_token); "
            "causal language modelling joins documents with one (special tokens found: "
            + (", ".join(tokenizer.all_special_tokens) or "none")
            + ")"
        )
    return int(tokenizer.eos_token_id)
