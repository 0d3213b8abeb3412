"""Batches of an end task: rows as token ids, padded to the longest row of the batch.

Shape legend: B rows, S tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from das_ds.downstream.tasks import Examples

Row = dict[str, list[int]]
"""Name of a network input -> one integer per token."""


class EncodedRows(NamedTuple):
    """Rows as token ids."""

    rows: list[Row]
    labels: list[int]
    num_truncated: int
    """Rows that were longer than allowed."""


class TaskBatch(NamedTuple):
    """Inputs of the network, (B, S) each, labels (B,), and indices of the rows in their file (B,)."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    positions: torch.Tensor


def encode_examples(examples: Examples, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> EncodedRows:
    """Token ids of all rows, truncated to `sequence_length`; of a pair, the longer text is truncated."""
    texts = (examples.texts,) if examples.pairs is None else (examples.pairs, examples.texts)
    untruncated = tokenizer(*texts, verbose=False)
    lengths = [len(ids) for ids in untruncated["input_ids"]]
    truncated = tokenizer(*texts, truncation=True, max_length=sequence_length)
    rows = [{name: truncated[name][index] for name in truncated} for index in range(len(lengths))]
    return EncodedRows(rows, examples.labels, sum(length > sequence_length for length in lengths))


def shuffled_batches(
    encoded: EncodedRows, batch_size: int, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator
) -> Iterator[TaskBatch]:
    """Every row once, in random order."""
    order = torch.randperm(len(encoded.rows), generator=generator)
    return _batches(encoded, order, batch_size, tokenizer)


def sorted_batches(encoded: EncodedRows, batch_size: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[TaskBatch]:
    """Every row once, sorted by length, which minimizes padding."""
    lengths = torch.tensor([len(row["input_ids"]) for row in encoded.rows])
    return _batches(encoded, lengths.argsort(stable=True), batch_size, tokenizer)


def _batches(
    encoded: EncodedRows, order: torch.Tensor, batch_size: int, tokenizer: PreTrainedTokenizerBase
) -> Iterator[TaskBatch]:
    for positions in order.split(batch_size):
        indices = positions.tolist()
        inputs = dict(tokenizer.pad([encoded.rows[i] for i in indices], return_tensors="pt"))
        yield TaskBatch(inputs, torch.tensor([encoded.labels[i] for i in indices]), positions)
