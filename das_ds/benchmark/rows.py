"""Rows: the inputs that a model reads to score choices, and the batches that ranks share.

Rows with the same input are computed once: choices of one token after the same context, and all others that lead to the
same input. Batches are composed of all rows before ranks share them, so that a row has the same neighbors and the same
padding on any number of ranks, and the result is the same to the last bit.

Shape legend: B rows, S positions, P predictions of a batch, T tokens of all choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from das_ds.benchmark.encoding import EncodedChoice

LENGTH_MULTIPLE = 64
"""Rows are padded to multiples of this length: few shapes, and little padding."""


@dataclass(slots=True)
class Row:
    """One input, and the predictions that are read from it."""

    ids: npt.NDArray[np.int32]
    """(S,)"""
    masked: int | None
    """Position whose token is masked, as yet only here; None: none."""
    positions: list[int] = field(default_factory=list)
    """Where to predict."""
    targets: list[int] = field(default_factory=list)
    """Tokens to predict there."""
    slots: list[int] = field(default_factory=list)
    """Where the predictions are among the T tokens of all choices."""


class BatchTensors(NamedTuple):
    """A batch as the model takes it."""

    input_ids: torch.Tensor
    """(B, S) int64"""
    is_token: torch.Tensor
    """(B, S) int64, 0 in the padding."""
    predicted: torch.Tensor
    """(P,) int64, positions among the flattened (B, S)."""
    targets: torch.Tensor
    """(P,) int64"""
    slots: torch.Tensor
    """(P,) int64"""

    def to(self, device: torch.device) -> BatchTensors:
        """The batch on a device."""
        return BatchTensors(*(tensor.to(device) for tensor in self))


@dataclass(frozen=True)
class RowBatch:
    """Rows that are computed together."""

    rows: Sequence[Row]
    num_rows: int
    """B: rows and, after the last of them, copies of the first."""
    length: int
    """S"""

    def tensors(self, padding_id: int, mask_id: int) -> BatchTensors:
        """The batch, padded at the end of its rows."""
        input_ids = torch.full((self.num_rows, self.length), padding_id)
        is_token = torch.zeros(self.num_rows, self.length, dtype=torch.int64)
        for number in range(self.num_rows):
            row = self.rows[number] if number < len(self.rows) else self.rows[0]
            input_ids[number, : len(row.ids)] = torch.from_numpy(row.ids)
            is_token[number, : len(row.ids)] = 1
            if row.masked is not None:
                input_ids[number, row.masked] = mask_id
        first = (number * self.length for number in range(len(self.rows)))
        return BatchTensors(
            input_ids,
            is_token,
            torch.tensor([start + p for start, row in zip(first, self.rows, strict=True) for p in row.positions]),
            torch.tensor([target for row in self.rows for target in row.targets]),
            torch.tensor([slot for row in self.rows for slot in row.slots]),
        )


def build_causal_rows(choices: Sequence[EncodedChoice]) -> list[Row]:
    """Rows of a decoder: all tokens but the last, of which those before the choice's predict it."""
    rows: dict[bytes, Row] = {}
    slot = 0
    for choice in choices:
        # The last token predicts nothing.
        row = _find_or_add(rows, choice.ids[:-1], None)
        num_tokens = choice.stop - choice.start
        row.positions += range(choice.start - 1, choice.stop - 1)
        row.targets += choice.ids[choice.start : choice.stop].tolist()
        row.slots += range(slot, slot + num_tokens)
        slot += num_tokens
    return list(rows.values())


def build_masked_rows(choices: Sequence[EncodedChoice], mask_id: int) -> list[Row]:
    """Rows of an encoder: one for each token of a choice, in which that token is masked and predicted."""
    rows: dict[bytes, Row] = {}
    slot = 0
    for choice in choices:
        for position in range(choice.start, choice.stop):
            row = _find_or_add(rows, choice.ids, position, mask_id)
            row.positions.append(position)
            row.targets.append(int(choice.ids[position]))
            row.slots.append(slot)
            slot += 1
    return list(rows.values())


def compose_batches(rows: Sequence[Row], batch_size: int, max_length: int) -> list[RowBatch]:
    """Batches of `batch_size` rows of one padded length, the longest first, which need most memory.

    Args:
        rows: in any order.
        batch_size: B; the last batch of each length is completed by copies.
        max_length: largest number of tokens that the model reads.
    """
    by_length: dict[int, list[Row]] = {}
    for row in rows:
        padded = -(-len(row.ids) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE  # rounded up
        by_length.setdefault(min(padded, max_length), []).append(row)
    return [
        RowBatch(same[first : first + batch_size], batch_size, length)
        for length, same in sorted(by_length.items(), reverse=True)
        for first in range(0, len(same), batch_size)
    ]


def _find_or_add(rows: dict[bytes, Row], ids: npt.NDArray[np.int32], masked: int | None, mask_id: int = 0) -> Row:
    """The row with this input; the dictionary has digests, because inputs are many and long."""
    shown = ids
    if masked is not None:
        shown = ids.copy()
        shown[masked] = mask_id
    # The bytes of inputs of different lengths differ.
    key = xxhash.xxh3_128_digest(np.ascontiguousarray(shown).tobytes())
    if key not in rows:
        rows[key] = Row(ids, masked)
    return rows[key]
