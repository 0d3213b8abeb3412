"""Tracing one layer: which features of which linear layer reach which input units of another.

The output of every linear layer is detached from the graph, so that a gradient at the input of one linear layer reaches
the linear layers that feed it directly and none before them.

Shape legend: R rows, S positions, A output features, F input features, U units.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from das_ds.models.inspect.probe import LENGTH, NUM_ROWS, VOCABULARY_SIZE, probe_ids


@dataclass(frozen=True, eq=False)
class TracedLinear:
    """One linear layer in one forward pass."""

    name: str
    """Relative to the transformer layer."""
    module: nn.Module
    input: torch.Tensor
    """(R, S, F), or with rows and positions flattened."""
    output: torch.Tensor
    """(..., A), detached: a leaf of the graph."""

    @property
    def is_transposed(self) -> bool:
        """Whether the rows of the stored weight are inputs."""
        return isinstance(self.module, Conv1D)

    @property
    def in_features(self) -> int:
        """F."""
        return self.input.shape[-1]

    @property
    def out_features(self) -> int:
        """A."""
        return self.output.shape[-1]


@dataclass(frozen=True)
class LayerFlow:
    """The linear layers of a transformer layer, in the order in which they ran."""

    linears: tuple[TracedLinear, ...]
    repeated: tuple[str, ...]
    """Linear layers that ran several times in one pass; not among `linears`."""
    unused: tuple[str, ...]
    """Linear layers that did not run."""
    position_mixing: tuple[str, ...]
    """Linear layers whose input at one position depends on the token at another."""

    def reachable_units(self, consumer: TracedLinear, num_units: int, units: list[int]) -> dict[str, torch.Tensor]:
        """For each feeding linear layer: which of its output features reach which units of the consumer's input.

        Args:
            consumer: the linear layer whose F input features divide into U units of consecutive features.
            num_units: U.
            units: the units to test.

        Returns:
            Name of a feeding linear layer -> (len(units), A) bool; those that reach none of the units are omitted.
        """
        feeders = [linear for linear in self.linears if linear is not consumer]
        # Random weights, so that the gradients of the features of a unit do not cancel in its sum.
        noise = torch.randn(consumer.input.shape, generator=torch.Generator().manual_seed(0))
        features = (consumer.input * noise).reshape(-1, num_units, consumer.in_features // num_units)
        unit_sums = features.sum(dim=(0, 2))  # (U,)
        if not unit_sums.requires_grad:
            return {}
        reached_by: dict[str, list[torch.Tensor]] = {linear.name: [] for linear in feeders}
        for unit in units:
            gradients = torch.autograd.grad(
                unit_sums[unit], [linear.output for linear in feeders], retain_graph=True, materialize_grads=True
            )
            for linear, gradient in zip(feeders, gradients, strict=True):
                reached_by[linear.name].append(gradient.flatten(0, -2).ne(0).any(dim=0))
        stacked = {name: torch.stack(rows) for name, rows in reached_by.items()}
        return {name: reached for name, reached in stacked.items() if reached.any()}


def trace_layer(model: PreTrainedModel, layer: nn.Module) -> LayerFlow:
    """Run the probe three times and record one layer: the first, whose input has not yet mixed positions."""
    names: dict[nn.Module, str] = {
        module: name for name, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    ids = probe_ids(model)
    calls: list[TracedLinear] = []
    with _record_calls(names, calls, detach=True):
        model(ids)
    changed_ids = ids.clone()
    # The neighbor of the last position: sliding windows may hide all tokens that are further away.
    changed_ids[:, -2] = 5 + (ids[:, -2] - 4) % (VOCABULARY_SIZE - 5)
    before: list[TracedLinear] = []
    after: list[TracedLinear] = []
    with torch.no_grad():
        for tokens, recorded in ((ids, before), (changed_ids, after)):
            with _record_calls(names, recorded, detach=False):
                model(tokens)
    called = [linear.name for linear in calls]
    return LayerFlow(
        linears=tuple(linear for linear in calls if called.count(linear.name) == 1),
        repeated=tuple(dict.fromkeys(name for name in called if called.count(name) > 1)),
        unused=tuple(name for name in names.values() if name not in called),
        position_mixing=tuple(
            one.name for one, other in zip(before, after, strict=False) if _last_position_differs(one, other)
        ),
    )


def _last_position_differs(before: TracedLinear, after: TracedLinear) -> bool:
    """Whether the input at the last position, whose token is the same, differs between two passes."""
    if before.name != after.name or before.input.shape != after.input.shape:
        return True
    if before.input.numel() != NUM_ROWS * LENGTH * before.in_features:
        # Not one vector per position: compare everything.
        return not torch.equal(before.input, after.input)
    last = [linear.input.reshape(NUM_ROWS, LENGTH, -1)[:, -1] for linear in (before, after)]
    return not torch.equal(*last)


@contextmanager
def _record_calls(names: dict[nn.Module, str], calls: list[TracedLinear], *, detach: bool) -> Iterator[None]:
    def record(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        leaf = output.detach().requires_grad_(detach)
        calls.append(TracedLinear(names[module], module, inputs[0], leaf))
        # A copy, because some layers add to an output in place.
        return leaf.clone()

    handles = [module.register_forward_hook(record) for module in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
