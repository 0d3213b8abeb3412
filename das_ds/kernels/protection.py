"""Protection: the importance of a flat tensor's elements, and the forms in which kernels read it.

Shape legend: F elements of a flat tensor.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from functools import cached_property

import torch

from das_ds.functional.masks import Segment, SegmentTable, dense_importance
from das_ds.kernels.cpu_tiles import CpuTile, split_into_cpu_tiles
from das_ds.kernels.tiles import Tiles, segment_fields, split_into_tiles

NUM_LEVELS = 255
"""Importance stored as uint8 counts 255ths: rounding errs by at most 1/510, and 0 and 1 are exact."""


class Protection:
    """Importance of every element of a flat tensor: by units, by parameter, or none.

    Args:
        numel: F.
        table: unit importance; its values may change in place afterwards.
        importance: (F,) float32, bfloat16 or uint8 (255ths) importance of each element; may change in place.
    """

    def __init__(
        self, numel: int, *, table: SegmentTable | None = None, importance: torch.Tensor | None = None
    ) -> None:
        assert table is None or importance is None, "importance is by units or by parameter"
        assert table is None or table.numel == numel, f"table of {table.numel} elements for {numel}"
        assert importance is None or importance.shape == (numel,), f"importance {importance.shape} for {numel}"
        self.numel = numel
        self.table = table
        self.importance = importance
        self._tiles: Tiles | None = None

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Segments that cover the tensor; one without protection where there is no table."""
        return self.table.segments if self.table is not None else (Segment(0, self.numel),)

    @cached_property
    def fields(self) -> torch.Tensor:
        """(num_segments, 6) int64 on the host, columns as in `SEGMENT_FIELDS`; for the C++ kernels."""
        return segment_fields(self.segments)

    @cached_property
    def cpu_tiles(self) -> tuple[CpuTile, ...]:
        """Cache-sized tiles for the torch kernels."""
        return split_into_cpu_tiles(self.segments, None if self.table is None else self.table.values)

    def triton_tiles(self, device: torch.device) -> Tiles:
        """Tiles for the Triton kernels, computed once."""
        if self._tiles is None:
            self._tiles = split_into_tiles(self.segments, self.numel, device)
        return self._tiles

    def crop(self, span: slice) -> Protection:
        """Protection of a slice of the flat tensor that cuts no segment, by the same values.

        Raises:
            ValueError: the slice begins or ends within a segment.
        """
        numel = span.stop - span.start
        if self.importance is not None:
            return Protection(numel, importance=self.importance[span])
        if self.table is None:
            return Protection(numel)
        inside = [s for s in self.segments if s.start < span.stop and s.stop > span.start]
        if any(s.start < span.start or s.stop > span.stop for s in inside):
            raise ValueError(
                f"span: found [{span.start}, {span.stop}) of {self.numel} elements, expected one or more complete "
                "segments"
            )
        segments = tuple(replace(segment, start=segment.start - span.start) for segment in inside)
        return Protection(numel, table=SegmentTable(numel, segments, self.table.values))

    def cpu_tiles_in(self, start: int, stop: int) -> tuple[CpuTile, ...]:
        """The CPU tiles that make up elements [start, stop).

        Raises:
            ValueError: the range begins or ends inside a tile.
        """
        first = bisect_left(self._tile_starts, start)
        last = bisect_left(self._tile_starts, stop)
        begins_tile = self._tile_starts[first : first + 1] == [start]
        ends_tile = [*self._tile_starts, self.numel][last] == stop
        if not (begins_tile and ends_tile):
            raise ValueError(
                f"range: found [{start}, {stop}) of {self.numel} elements, expected one or more complete tiles"
            )
        return self.cpu_tiles[first:last]

    @cached_property
    def _tile_starts(self) -> list[int]:
        return [tile.start for tile in self.cpu_tiles]

    def protects(self, tile: CpuTile) -> bool:
        """Whether anything in the tile has importance."""
        return bool(tile.rectangles) or self.importance is not None

    def scratch(self) -> torch.Tensor:
        """A buffer for the values of any tile, float32."""
        source = self.importance if self.table is None else self.table.values
        device = "cpu" if source is None else source.device
        return torch.empty(max(map(len, self.cpu_tiles), default=0), device=device)

    def lerp_toward_(self, new: torch.Tensor, old: torch.Tensor, tile: CpuTile, scratch: torch.Tensor) -> None:
        """new <- new + (old - new) * I, both float32 elements of one tile; exact at I = 0 and I = 1."""
        if self.importance is not None:
            new.lerp_(old, self._importance_in(tile, scratch))
        for rectangle in tile.rectangles:
            rectangle.crop(new).lerp_(rectangle.crop(old), rectangle.current_importance())

    def scale_grad_(self, values: torch.Tensor, tile: CpuTile, scratch: torch.Tensor) -> None:
        """values <- values * (1 - I), the elements of one tile in any floating type; computed in float32."""
        if self.importance is not None:
            values.copy_(values * self._importance_in(tile, scratch).neg_().add_(1.0))
        for rectangle in tile.rectangles:
            protected = rectangle.crop(values)
            protected.copy_(protected * (1.0 - rectangle.current_importance()))

    def _importance_in(self, tile: CpuTile, scratch: torch.Tensor) -> torch.Tensor:
        """(n,) float32 importance of a tile, in the scratch buffer."""
        assert self.importance is not None, "called only for parameter importance"
        stored = self.importance[tile.start : tile.stop]
        return torch.div(stored, NUM_LEVELS if stored.dtype == torch.uint8 else 1, out=scratch[: len(tile)])

    def to_dense(self) -> torch.Tensor:
        """(F,) float32: the importance of every element."""
        if self.table is not None:
            return dense_importance(self.table)
        if self.importance is None:
            return torch.zeros(self.numel)
        return as_float(self.importance)


def as_float(importance: torch.Tensor) -> torch.Tensor:
    """Importance as float32 in [0, 1], whatever it is stored as."""
    return importance / NUM_LEVELS if importance.dtype == torch.uint8 else importance.float()
