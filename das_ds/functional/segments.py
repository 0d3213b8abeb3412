"""Unit importance of a flat tensor as a short table: which stretch of which parameter lies where.

Shape legend: F elements of a flat tensor, V values, C columns of a parameter seen as a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

ABSENT = -1


@dataclass(frozen=True)
class Segment:
    """Elements [start, start + numel) of a flat tensor: elements [offset, offset + numel) of a flattened matrix.

    Element i of the segment has importance max(values[rows + (offset + i) // C], values[columns + (offset + i) % C]);
    an absent vector counts as 0. A ZeRO partition begins and ends anywhere, also inside a row.
    """

    start: int
    numel: int
    offset: int = 0
    num_columns: int = 1
    rows: int = ABSENT
    """Where the matrix's row importances begin in the values."""
    columns: int = ABSENT
    """Where the matrix's column importances begin in the values."""

    @property
    def stop(self) -> int:
        return self.start + self.numel

    @property
    def is_protected(self) -> bool:
        return self.rows != ABSENT or self.columns != ABSENT


@dataclass(frozen=True)
class SegmentTable:
    """Importance of every element of a flat tensor of F elements, in memory that does not grow with F."""

    numel: int
    segments: tuple[Segment, ...]
    """In order, without overlap, covering all F elements (see `cover`)."""
    values: torch.Tensor
    """(V,) float32 in [0, 1], one entry per row or column of a group's parameters; may change in place."""


def cover(segments: Iterable[Segment], numel: int) -> tuple[Segment, ...]:
    """The segments in order, with unprotected ones wherever a flat tensor of `numel` elements has none."""
    covered: list[Segment] = []
    position = 0
    for segment in sorted((s for s in segments if s.numel), key=lambda segment: segment.start):
        assert position <= segment.start <= segment.stop <= numel, f"{segment} overlaps or leaves {numel} elements"
        if position < segment.start:
            covered.append(Segment(position, segment.start - position))
        covered.append(segment)
        position = segment.stop
    if position < numel:
        covered.append(Segment(position, numel - position))
    return tuple(covered)


def importance_of(table: SegmentTable) -> torch.Tensor:
    """(F,) float32: the importance of every element written out, for reference and small tensors."""
    full = torch.zeros(table.numel, dtype=torch.float32, device=table.values.device)
    for segment in table.segments:
        index = segment.offset + torch.arange(segment.numel, device=full.device)
        part = full[segment.start : segment.stop]
        if segment.rows != ABSENT:
            part.copy_(table.values[segment.rows + index // segment.num_columns])
        if segment.columns != ABSENT:
            part.copy_(torch.maximum(part, table.values[segment.columns + index % segment.num_columns]))
    return full
