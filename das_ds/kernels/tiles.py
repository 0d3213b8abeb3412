"""Tile tables of the Triton kernels: which tile, and which segment in it, each program works on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from das_ds.functional.masks import Segment

TILE_ELEMENTS = 2048
"""Elements per program; tiles begin at multiples of it, so that loads are aligned."""
SEGMENT_FIELDS = ("start", "numel", "offset", "num_columns", "rows", "columns")


@dataclass(frozen=True)
class Tiles:
    """One entry per program: elements [tile * TILE_ELEMENTS, (tile + 1) * TILE_ELEMENTS) inside one segment.

    A tile that several segments meet in has one entry for each.
    """

    segments: torch.Tensor
    """(num_segments, 6) int64, columns as in `SEGMENT_FIELDS`."""
    tile: torch.Tensor
    """(num_tiles,) int32."""
    segment: torch.Tensor
    """(num_tiles,) int32, row of `segments`."""
    ends: torch.Tensor
    """(F / TILE_ELEMENTS,) int64 on the host: number of entries up to and including those of each tile."""

    def entries(self, start: int, stop: int) -> range:
        """The entries of the tiles that elements [start, stop) lie in."""
        first_tile = start // TILE_ELEMENTS
        last_tile = (stop - 1) // TILE_ELEMENTS
        return range(int(self.ends[first_tile - 1]) if first_tile else 0, int(self.ends[last_tile]))


def tile_elements() -> int:
    """`TILE_ELEMENTS`; a function, so that a test changes it for tables and kernels alike."""
    return TILE_ELEMENTS


def segment_fields(segments: tuple[Segment, ...]) -> torch.Tensor:
    """(num_segments, 6) int64, columns as in `SEGMENT_FIELDS`."""
    rows = [[getattr(segment, field) for field in SEGMENT_FIELDS] for segment in segments]
    return torch.tensor(rows, dtype=torch.int64).view(-1, len(SEGMENT_FIELDS))


def split_into_tiles(segments: tuple[Segment, ...], numel: int, device: torch.device | str) -> Tiles:
    """Tiles of segments that cover a flat tensor of `numel` elements; entries are in order of their elements."""
    fields = segment_fields(segments)
    starts = fields[:, 0]
    numels = fields[:, 1]
    # A segment has an entry in every tile that it touches.
    first_tiles = starts // TILE_ELEMENTS
    last_tiles = (starts + numels - 1) // TILE_ELEMENTS
    num_entries = last_tiles - first_tiles + 1
    segment = torch.repeat_interleave(torch.arange(len(segments)), num_entries)
    # Entry number within its segment, then the tile that it is in.
    first_entries = num_entries.cumsum(0) - num_entries
    entry_in_segment = torch.arange(len(segment)) - first_entries[segment]
    tile = first_tiles[segment] + entry_in_segment
    assert not len(tile) or int(tile[-1]) * TILE_ELEMENTS < numel, "segments reach beyond the flat tensor"
    ends = torch.bincount(tile, minlength=-(-numel // TILE_ELEMENTS)).cumsum(0)
    return Tiles(fields.to(device), tile.int().to(device), segment.int().to(device), ends)
