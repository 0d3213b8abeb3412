"""From unit importance to the protection of parameters, whole or cut into shards.

A parameter is a matrix of R rows and C columns whose element (r, c) has importance

    I[r, c] = max(rows[r], columns[c])          (a vector that is absent counts as 0)

so a mask is two vectors and never a tensor of the parameter's size. A ZeRO shard is a stretch of the flattened
parameter that may begin and end inside a row; `pieces_of_stretch` cuts it into at most three rectangles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from das_ds.functional.units import Importance, Ownership, UnitLayout

PIECE_ELEMENTS = 1 << 18
"""Largest piece: parameter, gradient, both moments and the old value of one piece stay in a core's cache."""


@dataclass(frozen=True)
class ParameterMask:
    """Importance of one parameter's rows (R,) and columns (C,), float32; views that `MaskTable.load` fills."""

    rows: torch.Tensor | None
    columns: torch.Tensor | None

    def importance(self) -> torch.Tensor:
        """I in the smallest shape that broadcasts to (R, C)."""
        return _rectangle(self.rows, self.columns)


@dataclass(frozen=True)
class Piece:
    """A rectangle of a parameter inside a flat shard: elements [start, start + num_rows * num_columns)."""

    start: int
    num_rows: int
    num_columns: int
    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    @property
    def stop(self) -> int:
        return self.start + self.num_rows * self.num_columns

    @property
    def is_masked(self) -> bool:
        return self.rows is not None or self.columns is not None

    def pull_back_(self, new: torch.Tensor, old: torch.Tensor) -> None:
        """new <- old + (1 - I) * (new - old), both flat tensors of this piece; exact at I = 0 and I = 1."""
        shape = (self.num_rows, self.num_columns)
        new.view(shape).lerp_(old.view(shape), _rectangle(self.rows, self.columns))


class MaskTable:
    """Masks of all protected parameters over one small flat buffer of importances.

    Every (group, layer, repeat) is one stretch of the buffer, expanded to rows or columns; parameters that share
    units share the stretch. Parameters that no unit owns have one importance, 1 - shared_scale.
    """

    def __init__(
        self, layout: UnitLayout, *, readers: bool, shared_scale: float, device: torch.device | str = "cpu"
    ) -> None:
        active = [item for item in layout.ownerships if readers or not item.reader]
        self._stretches: dict[tuple[str, int, int], slice] = {}
        size = 0
        for item in active:
            if (key := self._key(item)) not in self._stretches:
                length = layout.num_units[item.group] * item.units_repeat
                self._stretches[key] = slice(size, size + length)
                size += length
        self._buffer = torch.zeros(size, dtype=torch.float32, device=device)
        self.masks: dict[str, ParameterMask] = {}
        for name, (num_rows, _) in layout.shapes.items():
            by_axis = {
                item.axis: self._buffer[self._stretches[self._key(item)]] for item in active if item.parameter == name
            }
            if by_axis:
                self.masks[name] = ParameterMask(by_axis.get(0), by_axis.get(1))
            elif shared_scale < 1.0:
                shared = torch.full((1,), 1.0 - shared_scale, dtype=torch.float32, device=device)
                self.masks[name] = ParameterMask(shared.expand(num_rows), None)

    @staticmethod
    def _key(item: Ownership) -> tuple[str, int, int]:
        return item.group, item.layer, item.units_repeat

    def load(self, importance: Importance) -> None:
        """Fill the buffer, and with it every mask and piece made from this table, from group -> (L, U)."""
        for (group, layer, repeat), stretch in self._stretches.items():
            self._buffer[stretch] = importance[group][layer].to(self._buffer.device).repeat_interleave(repeat)


def pieces_of_stretch(
    mask: ParameterMask, *, flat_start: int, offset: int, numel: int, num_columns: int
) -> Iterator[Piece]:
    """Rectangles over elements [offset, offset + numel) of a flattened parameter, from `flat_start` on in a shard.

    A stretch that starts or ends inside a row gives a one-row rectangle there; whole rows between are cut so that no
    piece is larger than `PIECE_ELEMENTS` (but never smaller than a row).
    """
    position, end = offset, offset + numel
    rows_per_piece = max(1, PIECE_ELEMENTS // num_columns)
    while position < end:
        row, column = divmod(position, num_columns)
        if column or end - position < num_columns:
            num_rows, width = 1, min(num_columns - column, end - position)
        else:
            num_rows, width = min(rows_per_piece, (end - position) // num_columns), num_columns
        yield Piece(
            start=flat_start + position - offset,
            num_rows=num_rows,
            num_columns=width,
            rows=None if mask.rows is None else mask.rows[row : row + num_rows],
            columns=None if mask.columns is None else mask.columns[column : column + width],
        )
        position += num_rows * width


def fill_gaps(pieces: list[Piece], numel: int) -> list[Piece]:
    """Pieces that cover a whole flat shard of `numel` elements: the masked ones in order, unmasked ones between."""
    covered: list[Piece] = []
    position = 0
    for piece in [*sorted(pieces, key=lambda piece: piece.start), Piece(numel, 0, 1)]:
        while position < piece.start:
            length = min(PIECE_ELEMENTS, piece.start - position)
            covered.append(Piece(position, 1, length))
            position += length
        if piece.num_rows:
            covered.append(piece)
            position = piece.stop
    return covered


def _rectangle(rows: torch.Tensor | None, columns: torch.Tensor | None) -> torch.Tensor:
    if rows is None:
        assert columns is not None, "a rectangle without importance is not masked"
        return columns[None, :]
    if columns is None:
        return rows[:, None]
    return torch.maximum(rows[:, None], columns[None, :])
