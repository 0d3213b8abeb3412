"""Rows of an end task as token ids, and these as batches that are padded to their longest row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from das_ds.downstream.tasks import Examples

Row = dict[str, list[int]]
"""Input of the network -> one number per token."""


class EncodedRows(NamedTuple):
    """Rows as token ids."""

    rows: list[Row]
    labels: list[int]
    num_cut: int
    """Rows that were longer than allowed."""


class TaskBatch(NamedTuple):
    """Inputs of the network, (B, S) each, the labels (B,), and the positions of the rows in their file."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    positions: torch.Tensor


def encode_examples(examples: Examples, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> EncodedRows:
    """Token ids of all rows, cut at `sequence_length`; in pairs the longer of the two is cut."""
    texts = (examples.texts,) if examples.pairs is None else (examples.pairs, examples.texts)
    whole = tokenizer(*texts, verbose=False)
    lengths = [len(ids) for ids in whole["input_ids"]]
    cut = tokenizer(*texts, truncation=True, max_length=sequence_length)
    rows = [{name: cut[name][number] for name in cut} for number in range(len(lengths))]
    return EncodedRows(rows, examples.labels, sum(length > sequence_length for length in lengths))


def shuffled_batches(
    encoded: EncodedRows, batch_size: int, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator
) -> Iterator[TaskBatch]:
    """Every row once, in a fresh order."""
    order = torch.randperm(len(encoded.rows), generator=generator)
    return _batches(encoded, order, batch_size, tokenizer)


def sorted_batches(encoded: EncodedRows, batch_size: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[TaskBatch]:
    """Every row once, rows of like length together, which leaves little padding."""
    lengths = torch.tensor([len(row["input_ids"]) for row in encoded.rows])
    return _batches(encoded, lengths.argsort(stable=True), batch_size, tokenizer)


def _batches(
    encoded: EncodedRows, order: torch.Tensor, batch_size: int, tokenizer: PreTrainedTokenizerBase
) -> Iterator[TaskBatch]:
    for positions in order.split(batch_size):
        chosen = positions.tolist()
        inputs = dict(tokenizer.pad([encoded.rows[i] for i in chosen], return_tensors="pt"))
        yield TaskBatch(inputs, torch.tensor([encoded.labels[i] for i in chosen]), positions)
