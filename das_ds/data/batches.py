"""Micro-batches for masked language modelling; B = rows, S = tokens per row, P = predicted tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    input_ids: Tensor
    """(B, S) long, the text as it is."""
    corrupted_ids: Tensor
    """(B, S) long, the text with masked and replaced tokens."""
    predicted: Tensor
    """(P,) long, positions to predict as indices into the flat B * S; none in rows of weight 0."""
    targets: Tensor
    """(P,) long, tokens of the text at those positions."""
    row_weights: Tensor
    """(B,) float32, 1, or 0 for rows that only fill the batch so that all ranks run equally many forward passes."""
    position_ids: Tensor | None = None
    """(B, S) long, positions inside documents that attention does not leave; None: it crosses them."""

    @property
    def num_predicted(self) -> int:
        """P; known without asking the device."""
        return self.predicted.numel()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; the data loader calls this."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        present = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return Batch(**{name: change(value) for name, value in present.items()})
