"""Unit gates: factors on unit outputs that measure importance, build o^prev, or make two views of a text differ.

The gates are virtual (DAS, ICLR 2023): they are added by hooks while a context is open, and the model has
no parameters for them.

Shape legend: L layers, R rows of a packed batch, S positions, B sequences, U units of a layer, F features at a gate;
of tokens routed to an expert: n tokens, I units of that expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from das_ds.functional.units import UnitValues
from das_ds.kernels.unit_gate import measure_gate, unit_gate
from das_ds.models.architectures.spec import ArchitectureSpec, GateSite
from das_ds.models.moe import gated_experts_forward, measure_routed


class Gate(Protocol):
    """Acts on the units of one group in one layer."""

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """(R, S, F) -> (R, S, F); the units divide the features evenly."""

    def apply_routed(self, x: torch.Tensor, rows: torch.Tensor, first_unit: int) -> torch.Tensor:
        """(n, I) -> (n, I): tokens routed to one expert, from rows (n,); its units are [first_unit, first_unit + I)."""


@dataclass(frozen=True)
class ScaleGate:
    """Multiplies rows >= first_row by `values`, (1 or R - first_row, U): y = g x."""

    values: torch.Tensor
    first_row: int

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """See `kernels.unit_gate.unit_gate`."""
        return unit_gate(x, self.values, self.first_row)

    def apply_routed(self, x: torch.Tensor, rows: torch.Tensor, first_unit: int) -> torch.Tensor:
        """See `Gate.apply_routed`."""
        values = self.values[:, first_unit : first_unit + x.shape[1]]
        # (n, I), or (1, I) where all rows have the same gates; rows before `first_row` are replaced by 1 below.
        gate = values[(rows - self.first_row).clamp_min(0)] if len(values) > 1 else values
        factor = torch.where((rows >= self.first_row)[:, None], gate, 1.0)
        return (x * factor).to(x.dtype)


@dataclass(frozen=True)
class MeasureGate:
    """Identity with gates g = 1; the backward pass adds w_n |dL(x_n) / dg| of each sequence n to `sums`, (B, U)."""

    anchor: torch.Tensor
    sums: torch.Tensor
    row_weights: torch.Tensor
    num_views: int

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """See `kernels.unit_gate.measure_gate`."""
        # A copy: some layers (Falcon) add to an output in place, which would change the tensor saved for backward.
        return measure_gate(x, self.anchor, self.sums, self.row_weights, self.num_views).clone()

    def apply_routed(self, x: torch.Tensor, rows: torch.Tensor, first_unit: int) -> torch.Tensor:
        """See `Gate.apply_routed`."""
        sums = self.sums[:, first_unit : first_unit + x.shape[1]]
        return measure_routed(x, self.anchor, sums, self.row_weights, rows % len(sums))


@dataclass(frozen=True)
class DropoutGate:
    """Dropout on rows >= first_row."""

    probability: float
    first_row: int

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """See `Gate.apply`; rows before `first_row` are unchanged."""
        if self.first_row == 0:
            return functional.dropout(x, self.probability)
        return torch.cat((x[: self.first_row], functional.dropout(x[self.first_row :], self.probability)))

    def apply_routed(self, x: torch.Tensor, rows: torch.Tensor, first_unit: int) -> torch.Tensor:
        """See `Gate.apply_routed`."""
        return torch.where((rows >= self.first_row)[:, None], functional.dropout(x, self.probability), x)


class UnitGates:
    """Adds the gates of one model by hooks, for as long as one of the contexts below is open.

    Run the backward pass inside the context too: activation checkpointing runs the layers a second time there.
    """

    def __init__(self, model: PreTrainedModel, spec: ArchitectureSpec) -> None:
        self._sites = list(spec.gate_modules(model))

    @contextmanager
    def active(self, gates: UnitValues, *, num_rows: int, first_row: int = 0) -> Iterator[None]:
        """Multiply unit outputs of rows [first_row, num_rows) by `gates` (group -> (L, 1 or rows, U))."""
        with self._hooked(lambda group, layer: ScaleGate(gates[group][layer], first_row), num_rows):
            yield

    @contextmanager
    def measuring(self, sums: UnitValues, row_weights: torch.Tensor, num_views: int = 1) -> Iterator[torch.Tensor]:
        """Gates of ones, whose absolute gradients the backward pass sums: see `kernels.unit_gate.measure_gate`.

        Args:
            sums: group -> (L, B, U) float32, added to.
            row_weights: (B,) float32.
            num_views: rows of the batch for each of the B sequences.

        Yields:
            The scalar to differentiate by: `torch.autograd.grad(loss, anchor)`, inside the context.
        """
        anchor = torch.zeros((), device=row_weights.device, requires_grad=True)

        def build_gate(group: str, layer: int) -> Gate:
            return MeasureGate(anchor, sums[group][layer], row_weights, num_views)

        with self._hooked(build_gate, num_views * len(row_weights)):
            yield anchor

    @contextmanager
    def noise(self, probability: float, *, num_rows: int, first_row: int = 0) -> Iterator[None]:
        """Dropout on unit outputs of rows [first_row, num_rows), for models without dropout."""
        if probability == 0.0:
            yield
            return
        with self._hooked(lambda group, layer: DropoutGate(probability, first_row), num_rows):
            yield

    @contextmanager
    def _hooked(self, build_gate: Callable[[str, int], Gate], num_rows: int) -> Iterator[None]:
        removals = [
            _add_gate(module, site, build_gate(site.group, layer), num_rows) for site, layer, module in self._sites
        ]
        try:
            yield
        finally:
            # Last in, first out: restores the right forward of experts that were replaced twice.
            for remove in reversed(removals):
                remove()


def _add_gate(module: nn.Module, site: GateSite, gate: Gate, num_rows: int) -> Callable[[], None]:
    """Add a gate to a module; returns the function that removes it."""
    if site.position == "experts":
        return _replace_forward(module, gate, num_rows)

    def gated(x: torch.Tensor) -> torch.Tensor:
        # Some layers flatten rows and positions to (R * S, F); gates need (R, S, F).
        rows = x.reshape(num_rows, -1, x.shape[-1]).contiguous()
        return gate.apply(rows).view(x.shape)

    if site.position == "input":
        return module.register_forward_pre_hook(lambda _, inputs: (gated(inputs[0]), *inputs[1:])).remove
    return module.register_forward_hook(lambda _, __, output: gated(output)).remove


def _replace_forward(module: Any, gate: Gate, num_rows: int) -> Callable[[], None]:
    """Run a module of experts by `gated_experts_forward`; gates of several contexts apply one after the other."""
    before = module.__dict__.get("forward")
    earlier_gates = getattr(before, "gates", ()) if before is not None else ()
    gates = (*earlier_gates, gate.apply_routed)
    replaced: Any = partial(gated_experts_forward, module, gates, num_rows)
    replaced.gates = gates
    module.forward = replaced

    def restore() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    return restore
