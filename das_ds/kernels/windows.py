"""Flat tensors cut into windows that stay in a core's cache, with the protected rectangles of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from das_ds.functional.masks import ABSENT, Segment

WINDOW_ELEMENTS = 1 << 18
"""Most elements of a window: calling torch costs little beside the work, and what a step wrote is still in cache."""


@dataclass(frozen=True)
class Rectangle:
    """Rows and columns of a parameter inside a window: elements [start, start + num_rows * num_columns) of it."""

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

    def current(self) -> torch.Tensor:
        """I of the rectangle, of shape (num_rows, 1), (1, num_columns) or (num_rows, num_columns)."""
        assert self.importance is not None, "an unprotected rectangle has no importance"
        return self.importance if self.other is None else torch.maximum(self.importance, self.other)

    def of(self, window: torch.Tensor) -> torch.Tensor:
        """This rectangle's part of a window's elements, (num_rows, num_columns)."""
        return window[self.start : self.start + self.numel].view(self.num_rows, self.num_columns)


@dataclass(frozen=True)
class Window:
    """Elements [start, stop) of a flat tensor."""

    start: int
    stop: int
    rectangles: tuple[Rectangle, ...]
    """The protected ones."""

    def __len__(self) -> int:
        return self.stop - self.start


def split_into_windows(segments: tuple[Segment, ...], values: torch.Tensor | None) -> tuple[Window, ...]:
    """Windows over segments that cover a flat tensor; rectangles are views of `values`.

    Windows end at the ends of rows where rows are shorter than a window: every further rectangle is a further call.
    """
    windows: list[Window] = []
    start = position = 0
    inside: list[Rectangle] = []
    for rectangle in (r for segment in segments for r in _rectangles(segment, values)):
        if position - start + rectangle.numel > WINDOW_ELEMENTS:
            windows.append(Window(start, position, tuple(inside)))
            start, inside = position, []
        if rectangle.importance is not None:
            inside.append(_moved(rectangle, position - start))
        position += rectangle.numel
    if position > start:
        windows.append(Window(start, position, tuple(inside)))
    return tuple(windows)


def _moved(rectangle: Rectangle, start: int) -> Rectangle:
    return Rectangle(start, rectangle.num_rows, rectangle.num_columns, rectangle.importance, rectangle.other)


def _rectangles(segment: Segment, values: torch.Tensor | None) -> Iterator[Rectangle]:
    """A segment in rectangles of at most a window; one that begins or ends inside a row gives a one-row rectangle."""
    position, columns = 0, segment.num_columns if segment.is_protected else 1
    while position < segment.numel:
        row, column = divmod(segment.offset + position, columns)
        left = segment.numel - position
        if column or left < columns or columns > WINDOW_ELEMENTS:
            num_rows, width = 1, min(columns - column, left, WINDOW_ELEMENTS)
        else:
            num_rows, width = min(WINDOW_ELEMENTS, left) // columns, columns
        yield _rectangle(segment, values, row, column, num_rows, width)
        position += num_rows * width


def _rectangle(
    segment: Segment, values: torch.Tensor | None, row: int, column: int, num_rows: int, width: int
) -> Rectangle:
    if not segment.is_protected:
        return Rectangle(0, num_rows, width)
    assert values is not None, "a protected segment needs values"
    by_row = values[segment.rows + row :][:num_rows, None] if segment.rows != ABSENT else None
    by_column = values[segment.columns + column :][None, :width] if segment.columns != ABSENT else None
    if by_row is None:
        return Rectangle(0, num_rows, width, by_column)
    return Rectangle(0, num_rows, width, by_row, by_column)
