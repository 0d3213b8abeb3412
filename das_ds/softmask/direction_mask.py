"""Multiplies the rows of an optimizer's update by one matrix per parameter, wherever the shards cut the rows.

Shape legend: d columns of a parameter, n whole rows of it in a shard, C rows that a cut goes through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from das_ds.distributed.collectives import all_reduce_sum, in_collective, world_size
from das_ds.distributed.state import Shard


@dataclass(frozen=True)
class _Piece:
    """A part of one row that this rank has, and its place among the cut rows."""

    place: int
    stretch: slice
    """Of the flat tensor."""
    columns: slice
    mask: torch.Tensor


@dataclass(frozen=True)
class _Rows:
    """Whole rows of one parameter."""

    stretch: slice
    mask: torch.Tensor


@dataclass
class _Flat:
    """What one flat tensor holds of masked parameters."""

    rows: list[_Rows]
    pieces: list[_Piece]
    num_cut: int
    """C, of all ranks: how many rows they have to put together."""
    width: int
    """The largest d of these."""


class DirectionMask:
    """dW <- dW P for every masked parameter W (o, d), with its own P (d, d).

    A row of the result needs the whole row of the update. Ranks that have parts of one row each multiply their part by
    the rows of P that belong to it, and add up: a small collective per flat tensor and step, none where no row is cut.

    Args:
        shards: this rank's, without rows that are not masked.
        flat_of: parameter -> flat tensor that it lies in, also where this rank has no part of it.
        widths: parameter -> d, of all that are masked, in the same order on every rank.
        mask_of: parameter -> P, float32, the same on every rank; asked for parameters alone that this rank steps some
            of, since all together are as large as the model.
        device: where collectives run.
    """

    def __init__(
        self,
        shards: Iterable[Shard],
        flat_of: dict[str, torch.Tensor],
        widths: dict[str, int],
        mask_of: Callable[[str], torch.Tensor],
        device: torch.device,
    ) -> None:
        self._device = device
        own = [shard for shard in shards if shard.name in widths]
        cut = _cut_rows([(shard.name, shard.offset, shard.numel) for shard in own], widths)
        self._flats: dict[int, _Flat] = {}
        for name, width in widths.items():
            flat = self._flats.setdefault(id(flat_of[name]), _Flat([], [], 0, 0))
            if cut[name]:
                flat.width = max(flat.width, width)
        places: dict[tuple[str, int], int] = {}
        for name in widths:
            flat = self._flats[id(flat_of[name])]
            for row in cut[name]:
                places[name, row] = flat.num_cut
                flat.num_cut += 1
        masks: dict[str, torch.Tensor] = {}
        for shard in own:
            if shard.name not in masks:
                masks[shard.name] = mask_of(shard.name).to(shard.flat.device)
            self._add(shard, masks[shard.name], places)

    def remember(self, param: torch.Tensor) -> torch.Tensor | None:
        """The weights of a flat tensor as they are before a step; None where nothing in it is masked."""
        return param.data.view(-1).clone() if id(param) in self._flats else None

    def mask(self, param: torch.Tensor, old: torch.Tensor) -> None:
        """Mask what a step has made of a flat tensor; on all ranks that share its parameters.

        Args:
            param: after the step.
            old: (F,), before it.
        """
        flat, new = self._flats[id(param)], param.data.view(-1)
        for rows in flat.rows:
            after, before = (values[rows.stretch].view(-1, len(rows.mask)) for values in (new, old))
            torch.addmm(before, after - before, rows.mask, out=after)
        if flat.num_cut:
            self._mask_cut(flat, new, old)

    def _mask_cut(self, flat: _Flat, new: torch.Tensor, old: torch.Tensor) -> None:
        parts = torch.zeros(flat.num_cut, flat.width, device=new.device)
        for piece in flat.pieces:
            update = new[piece.stretch] - old[piece.stretch]
            parts[piece.place, : len(piece.mask)] += update @ piece.mask[piece.columns]
        summed = all_reduce_sum(parts.to(self._device)).to(new.device)
        for piece in flat.pieces:
            new[piece.stretch] = old[piece.stretch] + summed[piece.place, piece.columns]

    def _add(self, shard: Shard, mask: torch.Tensor, places: dict[tuple[str, int], int]) -> None:
        flat, width = self._flats[id(shard.flat)], len(mask)
        first, last = shard.offset, shard.offset + shard.numel
        begin, end = -(-first // width) * width, last // width * width
        if begin < end:
            flat.rows.append(_Rows(slice(shard.start + begin - first, shard.start + end - first), mask))
        for row in sorted({first // width, (last - 1) // width}):
            if (shard.name, row) not in places:
                continue
            low, high = max(first, row * width), min(last, (row + 1) * width)
            if high - low < width:
                stretch = slice(shard.start + low - first, shard.start + high - first)
                columns = slice(low - row * width, high - row * width)
                flat.pieces.append(_Piece(places[shard.name, row], stretch, columns, mask))


def _cut_rows(own: list[tuple[str, int, int]], widths: dict[str, int]) -> dict[str, list[int]]:
    """Parameter -> rows that shards of any rank end within, in the same order on every rank; a collective."""
    of_ranks: list[list[tuple[str, int, int]]] = [own]
    if world_size() > 1:
        of_ranks = [[] for _ in range(world_size())]
        with in_collective():
            dist.all_gather_object(of_ranks, own)
    cut: dict[str, set[int]] = {name: set() for name in widths}
    for shards in of_ranks:
        for name, offset, numel in shards:
            width = widths[name]
            cut[name] |= {place // width for place in (offset, offset + numel) if place % width}
    return {name: sorted(rows) for name, rows in cut.items()}
