"""Virtual gates: what multiplies unit outputs, to measure importance, to build o^prev, or to make views differ.

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

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """(R, S, F) -> (R, S, F); the units divide the features evenly."""

    def routed(self, x: torch.Tensor, rows: torch.Tensor, first_unit: int) -> torch.Tensor:
        """(n, I) -> (n, I): tokens of the given rows (n,), and units [first_unit, first_unit + I)."""


@dataclass(frozen=True)
class ScaleGate:
    """Multiplies rows >= first_row by `values`, (1 or R - first_row, U)."""

    values: torch.Tensor
    first_row: int

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """See `kernels.unit_gate.unit_gate`."""
        return unit_gate(x, self.values, self.first_row)

    def routed(self, x: torch.Tensor, rows: torch.Tensor, first_unit: int) -> torch.Tensor:
        """The same for tokens of an expert."""
        values = self.values[:, first_unit : first_unit + x.shape[1]]
        gate = values[(rows - self.first_row).clamp_min(0)] if len(values) > 1 else values
        factor = torch.where((rows >= self.first_row)[:, None], gate, 1.0)
        return (x * factor).to(x.dtype)


@dataclass(frozen=True)
class MeasureGate:
    """Changes nothing; adds w_n * |dL(x_n) / dg| of gates of ones to `sums`, (B, U), in the backward pass."""

    anchor: torch.Tensor
    sums: torch.Tensor
    row_weights: torch.Tensor
    num_views: int

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """See `kernels.unit_gate.measure_gate`."""
        # A copy, as some layers (Falcon) add to an output in place, which would change what the measurement kept.
        return measure_gate(x, self.anchor, self.sums, self.row_weights, self.num_views).clone()

    def routed(self, x: torch.Tensor, rows: torch.Tensor, first_unit: int) -> torch.Tensor:
        """The same for tokens of an expert."""
        sums = self.sums[:, first_unit : first_unit + x.shape[1]]
        return measure_routed(x, self.anchor, sums, self.row_weights, rows % len(sums))


@dataclass(frozen=True)
class DropoutGate:
    """Dropout on rows >= first_row."""

    probability: float
    first_row: int

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """Rows before `first_row` as they are."""
        if self.first_row == 0:
            return functional.dropout(x, self.probability)
        return torch.cat((x[: self.first_row], functional.dropout(x[self.first_row :], self.probability)))

    def routed(self, x: torch.Tensor, rows: torch.Tensor, first_unit: int) -> torch.Tensor:
        """The same for tokens of an expert."""
        return torch.where((rows >= self.first_row)[:, None], functional.dropout(x, self.probability), x)


class UnitGates:
    """Adds the gates of one model by hooks and takes them away again.

    The backward pass belongs inside the contexts too: activation checkpointing runs the layers again there.
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
        """Gates of ones, whose gradients the backward pass adds up: see `kernels.unit_gate.measure_gate`.

        Args:
            sums: group -> (L, B, U) float32, added to.
            row_weights: (B,) float32.
            num_views: the batch that passes the model has this many rows for each of the B sequences.

        Yields:
            The scalar to differentiate by: `torch.autograd.grad(loss, anchor)`, inside the context.
        """
        anchor = torch.zeros((), device=row_weights.device, requires_grad=True)
        measure = lambda group, layer: MeasureGate(anchor, sums[group][layer], row_weights, num_views)  # noqa: E731
        with self._hooked(measure, num_views * len(row_weights)):
            yield anchor

    @contextmanager
    def noise(self, probability: float, *, num_rows: int, first_row: int = 0) -> Iterator[None]:
        """Dropout on unit outputs of rows [first_row, num_rows), for networks that have none of their own."""
        if probability == 0.0:
            yield
            return
        with self._hooked(lambda group, layer: DropoutGate(probability, first_row), num_rows):
            yield

    @contextmanager
    def _hooked(self, gate_of: Callable[[str, int], Gate], num_rows: int) -> Iterator[None]:
        removals = [_add(module, site, gate_of(site.group, layer), num_rows) for site, layer, module in self._sites]
        try:
            yield
        finally:
            # Last in, first out: an experts' forward that was replaced twice is put back in the right order.
            for remove in reversed(removals):
                remove()


def _add(module: nn.Module, site: GateSite, gate: Gate, num_rows: int) -> Callable[[], None]:
    if site.position == "experts":
        return _replace_forward(module, gate, num_rows)

    def gated(x: torch.Tensor) -> torch.Tensor:
        # Some layers flatten rows and positions; a view brings them back.
        rows = x.reshape(num_rows, -1, x.shape[-1]).contiguous()
        return gate.whole(rows).view(x.shape)

    if site.position == "input":
        return module.register_forward_pre_hook(lambda _, inputs: (gated(inputs[0]), *inputs[1:])).remove
    return module.register_forward_hook(lambda _, __, output: gated(output)).remove


def _replace_forward(module: Any, gate: Gate, num_rows: int) -> Callable[[], None]:
    before = module.__dict__.get("forward")
    inner = getattr(before, "gates", ()) if before is not None else ()
    replaced: Any = partial(gated_experts_forward, module, (*inner, gate.routed), num_rows)
    replaced.gates = (*inner, gate.routed)
    module.forward = replaced

    def restore() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    return restore
