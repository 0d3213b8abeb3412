"""`soft_update_` in one launch over a stretch of a flat tensor."""

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
    importance, table = protection.importance, protection.table
    if not param.numel() or (importance is None and table is None):
        return
    tiles, stop = protection.tiles_on(param.device), start + param.numel()
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
        QUANTISED=importance is not None and importance.dtype == torch.uint8,
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
    QUANTISED: tl.constexpr,
):
    program = tl.program_id(0)
    fields = segments + tl.load(owners + program).to(tl.int64) * 6
    base, low, high = locate(tl.load(tiles + program), fields, TILE)
    first = tl.maximum(low, tl.maximum(start - base, 0).to(tl.int32))
    last = tl.minimum(high, tl.minimum(stop - base, TILE).to(tl.int32))
    pointers = (param + (base - start), old + (base - start), importance + base)
    if (first == 0) & (last == TILE):
        _pull_back(pointers, base, low, first, last, fields, values, TILE, BY_UNIT, QUANTISED, True)
    else:
        _pull_back(pointers, base, low, first, last, fields, values, TILE, BY_UNIT, QUANTISED, False)


@triton.jit
def _pull_back(  # type: ignore[no-untyped-def]
    pointers,
    base,
    low,
    first,
    last,
    fields,
    values,
    TILE: tl.constexpr,
    BY_UNIT: tl.constexpr,
    QUANTISED: tl.constexpr,
    FULL: tl.constexpr,
):
    param, old, importance = pointers
    i = tl.arange(0, TILE)
    inside = (i >= first) & (i < last)
    p = load(param + i, inside, FULL)
    before = load(old + i, inside, FULL)
    if BY_UNIT:
        share = unit_importance(i, inside, base, low, fields, values, FULL)
    else:
        share = as_importance(load(importance + i, inside, FULL), QUANTISED)
    # From the nearer end, as torch.lerp does: exact at 0 and at 1.
    pulled = tl.where(share < 0.5, p + share * (before - p), before - (before - p) * (1.0 - share))
    store(param + i, pulled, inside, FULL)
