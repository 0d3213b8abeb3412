"""Blocks of masked matrices: the vectors of a matrix, or the parts of vectors, that lie in a shard.

A vector of a matrix is what one output multiplies the input by: a row of d elements of a stored (o, d) matrix, a column
of a transposed one, stored as (d, o). A shard is a range of the flattened parameter that begins and ends anywhere.

Shape legend: d width of an input, o of an output, n vectors, m columns of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from das_ds.distributed.state import Shard
from das_ds.softmask.masked_matrix import MaskedMatrix


@dataclass(frozen=True)
class Block:
    """Consecutive vectors of a matrix at consecutive columns."""

    matrix: MaskedMatrix
    vectors: range
    """Of the o."""
    columns: range
    """Of the d."""

    @property
    def is_complete(self) -> bool:
        """Whether the vectors are complete."""
        return len(self.columns) == self.matrix.width

    @property
    def numel(self) -> int:
        """n m."""
        return len(self.vectors) * len(self.columns)

    def with_vectors(self, vectors: range) -> Block:
        """Some of its vectors."""
        return replace(self, vectors=vectors)

    def split(self, num_vectors: int) -> Iterator[Block]:
        """Blocks of at most so many of its vectors."""
        for first in range(self.vectors.start, self.vectors.stop, num_vectors):
            yield self.with_vectors(range(first, min(first + num_vectors, self.vectors.stop)))

    def view(self, values: torch.Tensor, first: int) -> torch.Tensor:
        """(n, m) view of the block.

        Args:
            values: flat, consecutive elements of the flattened parameter.
            first: which of the parameter's elements is the first of them; below 0 where others come before it.
        """
        matrix = self.matrix
        vector_stride = 1 if matrix.transposed else matrix.width
        column_stride = matrix.num_outputs if matrix.transposed else 1
        position = self.vectors.start * vector_stride + self.columns.start * column_stride
        return values.as_strided(
            (len(self.vectors), len(self.columns)),
            (vector_stride, column_stride),
            values.storage_offset() + matrix.start + position - first,
        )


class HeldElements(NamedTuple):
    """The elements of a matrix that lie in one shard; plain numbers, which ranks tell each other."""

    matrix: int
    """Which of the masked matrices, in the order in which every rank has them."""
    shard: int
    """Which of the shards of its rank."""
    begin: int
    """First element, of the flattened matrix."""
    end: int
    """After the last one."""

    def blocks(self, matrices: list[MaskedMatrix]) -> list[Block]:
        """See `split_into_blocks`."""
        return split_into_blocks(matrices[self.matrix], self.begin, self.end)


def find_held_elements(shards: Iterable[Shard], matrices: Iterable[MaskedMatrix]) -> list[HeldElements]:
    """What a rank's shards hold of masked matrices, in the order of shards."""
    by_parameter: dict[str, list[tuple[int, MaskedMatrix]]] = {}
    for number, matrix in enumerate(matrices):
        by_parameter.setdefault(matrix.parameter, []).append((number, matrix))
    held = []
    for shard_number, shard in enumerate(shards):
        for number, matrix in by_parameter.get(shard.name, ()):
            begin = max(shard.param_start - matrix.start, 0)
            end = min(shard.param_span.stop - matrix.start, matrix.numel)
            if begin < end:
                held.append(HeldElements(number, shard_number, begin, end))
    return held


def split_into_blocks(matrix: MaskedMatrix, begin: int, end: int) -> list[Block]:
    """At most three blocks that together are the elements [begin, end) of a flattened matrix.

    A part of the first stored row, complete rows, a part of the last one. In a transposed matrix the stored rows are
    the columns of its vectors: there complete rows are a part of every vector, unless all are there.
    """
    row = matrix.num_outputs if matrix.transposed else matrix.width
    first_row = begin // row
    last_row = end // row
    parts: list[tuple[range, range]] = []
    """(stored rows, positions in them)."""
    if begin % row:
        positions = range(begin % row, min(row, end - first_row * row))
        parts.append((range(first_row, first_row + 1), positions))
    if complete := range(-(-begin // row), last_row):
        parts.append((complete, range(row)))
    if end % row and last_row * row >= begin:
        parts.append((range(last_row, last_row + 1), range(end % row)))
    if matrix.transposed:
        return [Block(matrix, positions, rows) for rows, positions in parts]
    return [Block(matrix, rows, positions) for rows, positions in parts]
