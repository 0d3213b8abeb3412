"""Update masks: how much of an optimizer's step each weight takes.

Every soft mask of das_ds (by unit, by parameter, by direction) is one equation on a flat tensor of the optimizer,

    new <- old + M (new - old)

with a linear map M. Where M is diagonal, M = diag(1 - I) with an importance I of each element, the step and the mask
are one fused kernel; `gradient_mask.py` multiplies gradients by the same diagonal.

Shape legend: F elements of a flat tensor, n elements of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from das_ds.kernels.protection import Protection
from das_ds.kernels.soft_update import soft_update_

CHUNK_TILES = 16
"""CPU tiles per chunk of an element-wise mask: the old values of one chunk are copied, never those of all F."""


class UpdateMask(Protocol):
    """Masks the update of one flat tensor: new <- old + M (new - old)."""

    def chunks(self) -> Iterator[slice]:
        """Chunks of the flat tensor, in order and without gaps, that may be stepped and masked one by one."""

    def blend_(self, new: torch.Tensor, old: torch.Tensor, chunk: slice) -> None:
        """new <- old + M (new - old) for one chunk, in place.

        Args:
            new: (n,) float32 after the step.
            old: (n,) float32 before it.
            chunk: one of `chunks`. A mask may be collective: every rank then blends it in the same step.
        """


class ElementwiseMask:
    """M = diag(1 - I): importance by unit or by parameter.

    Args:
        protection: I of the F elements, in the form that kernels read.
    """

    def __init__(self, protection: Protection) -> None:
        self.protection = protection

    def chunks(self) -> Iterator[slice]:
        """`CHUNK_TILES` CPU tiles each; a kernel masks a tile while it is in the cache."""
        cpu_tiles = self.protection.cpu_tiles
        for first in range(0, len(cpu_tiles), CHUNK_TILES):
            last = min(first + CHUNK_TILES, len(cpu_tiles)) - 1
            yield slice(cpu_tiles[first].start, cpu_tiles[last].stop)

    def blend_(self, new: torch.Tensor, old: torch.Tensor, chunk: slice) -> None:
        """new <- new + (old - new) * I; exact at I = 0 and I = 1."""
        soft_update_(new, old, self.protection, start=chunk.start)


UpdateMasks = Mapping[torch.Tensor, UpdateMask]
"""Flat tensor of the optimizer -> the mask of its updates; flat tensors without one take their full steps."""
ElementwiseMasks = Mapping[torch.Tensor, ElementwiseMask]
