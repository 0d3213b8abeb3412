"""CPU tiles: flat tensors cut into ranges that stay in a core's cache, with the protected rectangles of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from das_ds.functional.masks import ABSENT, Segment

CPU_TILE_ELEMENTS = 1 << 18
"""Most elements of a tile: large enough that a call of torch costs little, small enough that a step's output is still
in the cache when it is masked."""


@dataclass(frozen=True)
class Rectangle:
    """Rows and columns of a parameter inside a tile: elements [start, start + num_rows * num_columns) of it."""

    start: int
    num_rows: int
    num_columns: int
    importance: torch.Tensor | None = None
    """Broadcasts to (num_rows, num_columns), a view of the table's values; None where nothing is protected."""
    other: torch.Tensor | None = None
    """Column importances where rows and columns both count."""

    @property
    def numel(self) -> int:
        return self.num_rows * self.num_columns

    def current_importance(self) -> torch.Tensor:
        """I of the rectangle, of shape (num_rows, 1), (1, num_columns) or (num_rows, num_columns)."""
        assert self.importance is not None, "an unprotected rectangle has no importance"
        return self.importance if self.other is None else torch.maximum(self.importance, self.other)

    def crop(self, tile: torch.Tensor) -> torch.Tensor:
        """View of this rectangle in a tile's elements (n,), of shape (num_rows, num_columns)."""
        return tile[self.start : self.start + self.numel].view(self.num_rows, self.num_columns)


@dataclass(frozen=True)
class CpuTile:
    """Elements [start, stop) of a flat tensor."""

    start: int
    stop: int
    rectangles: tuple[Rectangle, ...]
    """The protected ones."""

    def __len__(self) -> int:
        return self.stop - self.start


def split_into_cpu_tiles(segments: tuple[Segment, ...], values: torch.Tensor | None) -> tuple[CpuTile, ...]:
    """Tiles over segments that cover a flat tensor; rectangles are views of `values`.

    Tiles end at the ends of rows where rows are shorter than a tile: every further rectangle is a further call.
    """
    tiles: list[CpuTile] = []
    start = 0
    position = 0
    protected: list[Rectangle] = []
    for rectangle in (r for segment in segments for r in _split_into_rectangles(segment, values)):
        if position - start + rectangle.numel > CPU_TILE_ELEMENTS:
            tiles.append(CpuTile(start, position, tuple(protected)))
            start = position
            protected = []
        if rectangle.importance is not None:
            protected.append(replace(rectangle, start=position - start))
        position += rectangle.numel
    if position > start:
        tiles.append(CpuTile(start, position, tuple(protected)))
    return tuple(tiles)


def _split_into_rectangles(segment: Segment, values: torch.Tensor | None) -> Iterator[Rectangle]:
    """A segment in rectangles of at most a tile; one that begins or ends inside a row gives a one-row rectangle."""
    # Where nothing is protected, the shape of the matrix does not matter: one column.
    num_columns = segment.num_columns if segment.is_protected else 1
    position = 0
    while position < segment.numel:
        row, column = divmod(segment.offset + position, num_columns)
        remaining = segment.numel - position
        if column or remaining < num_columns or num_columns > CPU_TILE_ELEMENTS:
            # The rest of a row that the segment begins in, the start of one it ends in, or a slice of a very long one.
            num_rows = 1
            width = min(num_columns - column, remaining, CPU_TILE_ELEMENTS)
        else:
            num_rows = min(CPU_TILE_ELEMENTS, remaining) // num_columns
            width = num_columns
        yield _view_importance(segment, values, row, column, num_rows, width)
        position += num_rows * width


def _view_importance(
    segment: Segment, values: torch.Tensor | None, row: int, column: int, num_rows: int, width: int
) -> Rectangle:
    """A rectangle at (row, column) of the segment's matrix, not placed in a tile yet."""
    if not segment.is_protected:
        return Rectangle(0, num_rows, width)
    assert values is not None, "a protected segment needs values"
    # (num_rows, 1) and (1, width): views, so that the values may change in place.
    by_row = values[segment.rows + row :][:num_rows, None] if segment.rows != ABSENT else None
    by_column = values[segment.columns + column :][None, :width] if segment.columns != ABSENT else None
    if by_row is None:
        return Rectangle(0, num_rows, width, by_column)
    return Rectangle(0, num_rows, width, by_row, by_column)
