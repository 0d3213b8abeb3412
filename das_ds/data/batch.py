"""Micro-batches for masked and causal language modeling.

Shape legend: B rows, S tokens per row, P predicted tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    input_ids: Tensor
    """(B, S) long, the original text."""
    corrupted_ids: Tensor
    """(B, S) long, the input of the network: with masked and replaced tokens, or `input_ids` itself (causal)."""
    predicted: Tensor
    """(P,) long, positions that predict, as indices into the flattened (B, S); none in rows of weight 0."""
    targets: Tensor
    """(P,) long, the token that each of them predicts: the original one there, or the next one (causal)."""
    row_weights: Tensor
    """(B,) float32: 1, or 0 for padding rows, which exist so that all ranks run equally many forward passes."""
    position_ids: Tensor | None = None
    """(B, S) long, position of each token in its document; None without document mask."""
    replayed_rows: Tensor | None = None
    """(R,) long, rows that are replayed, ascending; None: none are."""
    replayed: Tensor | None = None
    """(Q,) long, which of `predicted` are in these rows, ascending; None: none are."""

    @property
    def num_predicted(self) -> int:
        """P, from the shape, without a device sync."""
        return self.predicted.numel()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; the data loader calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if value is not None})
