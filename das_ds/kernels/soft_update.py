"""Soft update: the step of any optimizer is undone in proportion to the importance.

Shape legend: F elements of a flat tensor, n elements of a chunk of it.
"""

from __future__ import annotations

import torch

from das_ds.kernels.cpu_tiles import CpuTile
from das_ds.kernels.dispatch import check_flat, use_triton
from das_ds.kernels.native import protection_arguments, run, use_native
from das_ds.kernels.protection import Protection


def soft_update_(param: torch.Tensor, old: torch.Tensor, protection: Protection, *, start: int = 0) -> None:
    """p <- p + (p_old - p) * I over elements [start, start + n) of a flat tensor; exact at I = 0 and I = 1.

    Args:
        param: (n,) float32, values after the step, updated in place.
        old: (n,) float32, values before the step.
        protection: importance of the flat tensor's F elements.
        start: first element; the chunk is one or several of `protection.cpu_tiles`.

    Raises:
        ValueError: tensors of another shape, type, device or layout, or a chunk that cuts a tile.
    """
    check_flat({"param": param, "old": old}, param.numel())
    cpu_tiles = protection.cpu_tiles_in(start, start + param.numel())
    if use_triton("soft_update", param):
        from das_ds.kernels.soft_update_triton import soft_update_triton_

        soft_update_triton_(param, old, protection, start)
    elif use_native(param):
        soft_update_native_(param, old, protection, start)
    else:
        soft_update_torch_(param, old, protection, start, cpu_tiles)


def soft_update_native_(param: torch.Tensor, old: torch.Tensor, protection: Protection, start: int) -> None:
    """The soft update in C++, in one pass."""
    before = (param.data_ptr(), old.data_ptr(), start, *protection_arguments(protection))
    run("soft_update", start, start + param.numel(), before)


def soft_update_torch_(
    param: torch.Tensor, old: torch.Tensor, protection: Protection, start: int, cpu_tiles: tuple[CpuTile, ...]
) -> None:
    """The soft update in torch, tile by tile."""
    scratch = protection.scratch()
    for tile in cpu_tiles:
        within_chunk = slice(tile.start - start, tile.stop - start)
        protection.lerp_toward_(param[within_chunk], old[within_chunk], tile, scratch)
