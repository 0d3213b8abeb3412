"""`soft_update_` in one launch over a chunk of a flat tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from das_ds.kernels.protection import Protection
from das_ds.kernels.segments_triton import as_importance, load, locate, store, unit_importance
from das_ds.kernels.tiles import tile_elements

NUM_WARPS = 8


def soft_update_triton_(param: torch.Tensor, old: torch.Tensor, protection: Protection, start: int) -> None:
    """Arguments as for `kernels.soft_update.soft_update_`."""
    importance = protection.importance
    table = protection.table
    if not param.numel() or (importance is None and table is None):
        return
    stop = start + param.numel()
    tiles = protection.triton_tiles(param.device)
    # The chunk may begin and end within a tile: its programs work only on the elements inside.
    entries = tiles.entries(start, stop)
    _soft_update[(len(entries),)](
        param,
        old,
        param if importance is None else importance,
        param if table is None else table.values,
        tiles.tile[entries.start :],
        tiles.segment[entries.start :],
        tiles.segments,
        start,
        stop,
        TILE=tile_elements(),
        BY_UNIT=table is not None,
        QUANTIZED=importance is not None and importance.dtype == torch.uint8,
        num_warps=NUM_WARPS,
    )


@triton.jit
def _soft_update(  # type: ignore[no-untyped-def]
    param,
    old,
    importance,
    values,
    tiles,
    owners,
    segments,
    start,
    stop,
    TILE: tl.constexpr,
    BY_UNIT: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    program = tl.program_id(0)
    fields = segments + tl.load(owners + program).to(tl.int64) * 6
    base, low, high = locate(tl.load(tiles + program), fields, TILE)
    # [low, high) is the tile within its segment, [first, last) also within the chunk.
    first = tl.maximum(low, tl.maximum(start - base, 0).to(tl.int32))
    last = tl.minimum(high, tl.minimum(stop - base, TILE).to(tl.int32))
    # `param` and `old` begin with the chunk, importance with the flat tensor.
    pointers = (param + (base - start), old + (base - start), importance + base)
    # Two copies of the code: loads without a mask are wide.
    if (first == 0) & (last == TILE):
        _lerp_toward(pointers, base, low, first, last, fields, values, TILE, BY_UNIT, QUANTIZED, True)
    else:
        _lerp_toward(pointers, base, low, first, last, fields, values, TILE, BY_UNIT, QUANTIZED, False)


@triton.jit
def _lerp_toward(  # type: ignore[no-untyped-def]
    pointers,
    base,
    low,
    first,
    last,
    fields,
    values,
    TILE: tl.constexpr,
    BY_UNIT: tl.constexpr,
    QUANTIZED: tl.constexpr,
    FULL: tl.constexpr,
):
    param, old, importance = pointers
    # Elements of the tile; the pointers begin with it.
    i = tl.arange(0, TILE)
    inside = (i >= first) & (i < last)
    p = load(param + i, inside, FULL)
    before = load(old + i, inside, FULL)
    if BY_UNIT:
        share = unit_importance(i, inside, base, low, fields, values, FULL)
    else:
        share = as_importance(load(importance + i, inside, FULL), QUANTIZED)
    # From the nearer end, as torch.lerp does: exact at 0 and at 1.
    blended = tl.where(share < 0.5, p + share * (before - p), before - (before - p) * (1.0 - share))
    store(param + i, blended, inside, FULL)
