"""`MaskedScale` in one launch over many tensors, which are found through a table of their addresses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
import triton
import triton.language as tl

from das_ds.kernels.protection import Protection
from das_ds.kernels.segments_triton import as_importance, load, locate, store, unit_importance
from das_ds.kernels.tiles import tile_elements

NUM_WARPS = 8
VECTOR_BYTES = 16
ELEMENT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.uint8: tl.uint8}


class ScaleLaunch:
    """The tables of a fixed list of protections, joined.

    Args:
        protections: one per tensor, see `kernels.masked_scale.MaskedScale`.
        device: where the tensors are.
    """

    def __init__(self, protections: Sequence[Protection], device: torch.device) -> None:
        self._device = device
        tables = [protection.triton_tiles(device) for protection in protections]
        # Segments of all tensors in one table: every tensor's own are numbered on from those before.
        first_segments = accumulate((len(table.segments) for table in tables[:-1]), initial=0)
        self._segments = torch.cat([table.segments for table in tables])
        self._tile = torch.cat([table.tile for table in tables])
        self._segment = torch.cat([table.segment + first for table, first in zip(tables, first_segments, strict=True)])
        self._tensor = torch.cat([torch.full_like(table.tile, number) for number, table in enumerate(tables)])
        self._values = next((p.table.values for p in protections if p.table is not None), None)
        self._importances = [p.importance for p in protections if p.importance is not None]

    @cached_property
    def _importance_addresses(self) -> torch.Tensor:
        return self._addresses(self._importances)

    def __call__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Scale the tensors in place."""
        if not len(self._tile) or (self._values is None and not self._importances):
            return
        addresses = self._addresses(tensors)
        read_tensors = [*tensors, *self._importances]
        _masked_scale[(len(self._tile),)](
            addresses,
            self._importance_addresses if self._importances else addresses,
            tensors[0] if self._values is None else self._values,
            self._tensor,
            self._tile,
            self._segment,
            self._segments,
            TILE=tile_elements(),
            ELEMENT=ELEMENT[tensors[0].dtype],
            IMPORTANCE=ELEMENT[self._importances[0].dtype] if self._importances else tl.float32,
            BY_UNIT=self._values is not None,
            QUANTIZED=bool(self._importances) and self._importances[0].dtype == torch.uint8,
            ALIGNED=all(tensor.data_ptr() % VECTOR_BYTES == 0 for tensor in read_tensors),
            num_warps=NUM_WARPS,
        )

    def _addresses(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """(T,) int64, sent without waiting for the device."""
        host = torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)
        if self._device.type == "cuda":
            host = host.pin_memory()
        return host.to(self._device, non_blocking=True)


@triton.jit
def _masked_scale(  # type: ignore[no-untyped-def]
    addresses,
    importance_addresses,
    values,
    numbers,
    tiles,
    owners,
    segments,
    TILE: tl.constexpr,
    ELEMENT: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    BY_UNIT: tl.constexpr,
    QUANTIZED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    # One program per entry of the tile table: a tile of one tensor, and one segment that lies in it.
    program = tl.program_id(0)
    number = tl.load(numbers + program)
    fields = segments + tl.load(owners + program).to(tl.int64) * 6
    base, low, high = locate(tl.load(tiles + program), fields, TILE)
    # Addresses instead of arguments: any number of tensors in one launch.
    tensor = tl.load(addresses + number).to(tl.pointer_type(ELEMENT))
    stored = tl.load(importance_addresses + number).to(tl.pointer_type(IMPORTANCE))
    if ALIGNED:
        # The compiler knows nothing of an address that it loads; aligned ones allow wide loads.
        tensor = tl.multiple_of(tensor, 16)
        stored = tl.multiple_of(stored, 16)
    pointers = (tensor + base, stored + base)
    # Two copies of the code: loads without a mask are wide.
    if (low == 0) & (high == TILE):
        _scale(pointers, base, low, high, fields, values, TILE, BY_UNIT, QUANTIZED, True)
    else:
        _scale(pointers, base, low, high, fields, values, TILE, BY_UNIT, QUANTIZED, False)


@triton.jit
def _scale(  # type: ignore[no-untyped-def]
    pointers,
    base,
    low,
    high,
    fields,
    values,
    TILE: tl.constexpr,
    BY_UNIT: tl.constexpr,
    QUANTIZED: tl.constexpr,
    FULL: tl.constexpr,
):
    tensor, importance = pointers
    # Elements of the tile; the pointers begin with it.
    i = tl.arange(0, TILE)
    inside = (i >= low) & (i < high)
    x = load(tensor + i, inside, FULL)
    if BY_UNIT:
        share = unit_importance(i, inside, base, low, fields, values, FULL)
    else:
        share = as_importance(load(importance + i, inside, FULL), QUANTIZED)
    # In float32, rounded once.
    store(tensor + i, (x.to(tl.float32) * (1.0 - share)).to(x.dtype), inside, FULL)
