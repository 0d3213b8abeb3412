"""Masks: how much of an optimizer's step each weight takes.

Every soft mask of das_ds (by unit, by parameter, by direction) is a linear map M, of the optimizer's update of a flat
tensor or of the gradient before it is clipped:

    new <- old + M (new - old)        gradient <- M gradient

Where M is diagonal, M = diag(1 - I) with an importance I of each element, the step and the mask of the update are one
fused kernel.

Shape legend: F elements of a flat tensor, n elements of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
            chunk: one of `chunks`.
        """

    def finish_(self, flat: torch.Tensor) -> None:
        """Complete the update once every chunk was blended: what depends on other ranks.

        Args:
            flat: (F,) float32. A mask may be collective: every rank then steps the flat tensor at the same time.
        """


class GradientMask(Protocol):
    """Masks the averaged gradients of this rank's shards between the backward pass and the step."""

    def apply_(self, gradients: Sequence[torch.Tensor]) -> None:
        """gradient <- M gradient, in place, without waiting for the device; may be a collective.

        Args:
            gradients: (numel,) of each shard of the engine's weights, in their order, times the loss scale; all of one
                type, float32 or 16 bits, on the device where the optimizer steps.
        """


class DecayMask(Protocol):
    """Masks the decoupled weight decay of one flat tensor, W <- W - r M W, where gradients are masked by M."""

    def compensate_(self, weights: torch.Tensor, decay: float) -> None:
        """W <- W + r / (1 - r) (W - M W), after which a step with the decay r has decayed M W; may be a collective.

        Args:
            weights: (F,) float32, before the step, which multiplies them by 1 - r.
            decay: r, learning rate times weight decay.
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

    def finish_(self, flat: torch.Tensor) -> None:
        """Nothing: every element is masked by itself."""


UpdateMasks = Mapping[torch.Tensor, UpdateMask]
"""Flat tensor of the optimizer -> the mask of its updates; flat tensors without one take their full steps."""
DecayMasks = Mapping[torch.Tensor, DecayMask]
ElementwiseMasks = Mapping[torch.Tensor, ElementwiseMask]
