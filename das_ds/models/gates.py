"""Virtual gates: vectors of ones that multiply unit outputs, to measure importance and to build o^prev.

Shape legend: R rows of a packed batch, S positions, U units, D features per unit (F = U * D).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from das_ds.models.adapter import ArchitectureAdapter


class UnitGate(torch.autograd.Function):
    """y[r] = x[r] * g for rows r >= first_row, y[r] = x[r] before; dg[r, u] = sum over s, d of dy * x in float32.

    A gate with one entry per row receives the gradient of that row alone, which is what importance needs
    (paper eq. 2 takes the absolute value per sequence).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gate: torch.Tensor, first_row: int) -> torch.Tensor:
        """x (R, S, F), gate (1 or R - first_row, U) -> (R, S, F)."""
        features = _feature_gate(gate, x)
        ctx.first_row, ctx.features = first_row, features
        ctx.gate_shape, ctx.gate_dtype = gate.shape, gate.dtype
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(x)
        return _scale_tail(x, features, first_row)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        (dy,) = grad_outputs
        dx = _scale_tail(dy, ctx.features, ctx.first_row) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None
        (x,) = ctx.saved_tensors
        tail_dy, tail_x = dy[ctx.first_row :], x[ctx.first_row :]
        per_feature = (tail_dy.float() * tail_x.float()).sum(dim=1)
        num_units = ctx.gate_shape[1]
        per_unit = per_feature.view(-1, num_units, x.shape[-1] // num_units).sum(dim=2)
        return dx, per_unit.sum_to_size(ctx.gate_shape).to(ctx.gate_dtype), None


class UnitGates:
    """Adds the gates of one model by hooks and takes them away again."""

    def __init__(self, model: PreTrainedModel, adapter: ArchitectureAdapter) -> None:
        self._sites = list(adapter.gate_modules(model))

    @contextmanager
    def active(self, gates: dict[str, torch.Tensor], first_row: int = 0) -> Iterator[None]:
        """Multiply unit outputs of rows >= first_row by `gates` (group -> (L, 1 or rows, U)).

        The backward pass belongs inside the context too: activation checkpointing runs the layers again there.
        """
        handles = [
            self._add(module, site.position, gates[site.group][layer], first_row) for site, layer, module in self._sites
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _add(module: nn.Module, position: str, gate: torch.Tensor, first_row: int) -> torch.utils.hooks.RemovableHandle:
        if position == "input":
            return module.register_forward_pre_hook(
                lambda _, inputs: (UnitGate.apply(inputs[0], gate, first_row), *inputs[1:])
            )
        return module.register_forward_hook(lambda _, __, output: UnitGate.apply(output, gate, first_row))


def _feature_gate(gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(G, U) -> (G, 1, F) in x's dtype, each unit's entry repeated over its features."""
    repeat = x.shape[-1] // gate.shape[1]
    return gate.detach().to(x.dtype).repeat_interleave(repeat, dim=1)[:, None, :]


def _scale_tail(x: torch.Tensor, features: torch.Tensor, first_row: int) -> torch.Tensor:
    # One pass over the tensor: writing both parts into one output avoids the copy that torch.cat would add.
    scaled = torch.empty_like(x)
    scaled[:first_row] = x[:first_row]
    torch.mul(x[first_row:], features, out=scaled[first_row:])
    return scaled
