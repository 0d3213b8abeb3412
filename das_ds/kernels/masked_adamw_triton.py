"""Masked AdamW in one launch over a flat tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from das_ds.kernels.adamw_step import AdamWStep
from das_ds.kernels.protection import Protection
from das_ds.kernels.segments_triton import as_importance, load, locate, store, unit_importance
from das_ds.kernels.tiles import tile_elements

NUM_WARPS = 8


def masked_adamw_triton_(step: AdamWStep, protection: Protection) -> None:
    """One program per tile; see `kernels.masked_adamw.masked_adamw_`."""
    if not step.param.numel():
        return
    tiles = protection.triton_tiles(step.param.device)
    importance = protection.importance
    table = protection.table
    _masked_adamw[(len(tiles.tile),)](
        *step.tensors,
        step.param if importance is None else importance,
        step.param if table is None else table.values,
        step.param if step.grad_scale is None else step.grad_scale,
        tiles.tile,
        tiles.segment,
        tiles.segments,
        *step.hyperparameters,
        TILE=tile_elements(),
        BY_UNIT=table is not None,
        BY_PARAMETER=importance is not None,
        QUANTIZED=importance is not None and importance.dtype == torch.uint8,
        SCALED=step.grad_scale is not None,
        num_warps=NUM_WARPS,
    )


@triton.jit
def _masked_adamw(  # type: ignore[no-untyped-def]
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    importance,
    values,
    grad_scale,
    tiles,
    owners,
    segments,
    step_size,
    root_correction,
    share1,
    share2,
    eps,
    decay,
    TILE: tl.constexpr,
    BY_UNIT: tl.constexpr,
    BY_PARAMETER: tl.constexpr,
    QUANTIZED: tl.constexpr,
    SCALED: tl.constexpr,
):
    # One program per entry of the tile table: a tile, and one segment that lies in it.
    program = tl.program_id(0)
    fields = segments + tl.load(owners + program).to(tl.int64) * 6
    base, low, high = locate(tl.load(tiles + program), fields, TILE)
    scale = 1.0
    if SCALED:
        # Loss scale times clipping factor, read on the device: no host-device sync.
        scale = 1.0 / tl.load(grad_scale)
    pointers = (param + base, grad + base, exp_avg + base, exp_avg_sq + base, importance + base)
    settings = (scale, step_size, root_correction, share1, share2, eps, decay)
    # Two copies of the code: loads without a mask are wide.
    if (low == 0) & (high == TILE):
        _step(pointers, settings, base, low, high, fields, values, TILE, BY_UNIT, BY_PARAMETER, QUANTIZED, True)
    else:
        _step(pointers, settings, base, low, high, fields, values, TILE, BY_UNIT, BY_PARAMETER, QUANTIZED, False)


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    pointers,
    settings,
    base,
    low,
    high,
    fields,
    values,
    TILE: tl.constexpr,
    BY_UNIT: tl.constexpr,
    BY_PARAMETER: tl.constexpr,
    QUANTIZED: tl.constexpr,
    FULL: tl.constexpr,
):
    param, grad, exp_avg, exp_avg_sq, importance = pointers
    scale, step_size, root_correction, share1, share2, eps, decay = settings
    # Elements of the tile; the pointers begin with it.
    i = tl.arange(0, TILE)
    inside = (i >= low) & (i < high)
    p = load(param + i, inside, FULL)
    g = load(grad + i, inside, FULL) * scale
    m = load(exp_avg + i, inside, FULL)
    v = load(exp_avg_sq + i, inside, FULL)
    # The moments see the unmasked gradient; only the step is masked.
    m += share1 * (g - m)
    v += share2 * (g * g - v)
    # step_size and root_correction hold the bias corrections.
    delta = decay * p + step_size * m / (tl.sqrt(v) * root_correction + eps)
    if BY_UNIT:
        delta *= 1.0 - unit_importance(i, inside, base, low, fields, values, FULL)
    if BY_PARAMETER:
        delta *= 1.0 - as_importance(load(importance + i, inside, FULL), QUANTIZED)
    store(param + i, p - delta, inside, FULL)
    store(exp_avg + i, m, inside, FULL)
    store(exp_avg_sq + i, v, inside, FULL)
