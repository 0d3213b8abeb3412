"""Micro-batches for masked language modelling; B = rows, S = tokens per row, P = predicted tokens."""

from __future__ import annotations

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

    @property
    def num_predicted(self) -> int:
        """P; known without asking the device."""
        return self.predicted.numel()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on a device."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)})

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; the data loader calls this."""
        return Batch(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})
