"""What the optimizer needs of a mask that mixes the columns of an update."""

from __future__ import annotations

from typing import Protocol

import torch


class RowUpdateMask(Protocol):
    """Masks what a step has made of a flat tensor: new <- old + (new - old) P, row by row."""

    def remember(self, param: torch.Tensor) -> torch.Tensor | None:
        """The weights of a flat tensor as they are before a step; None where nothing in it is masked."""

    def mask(self, param: torch.Tensor, old: torch.Tensor) -> None:
        """Mask a flat tensor after a step, (F,) `old` before it; on all ranks that share its parameters."""
