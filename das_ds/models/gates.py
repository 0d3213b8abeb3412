"""Virtual gates: vectors of ones that multiply unit outputs, to measure importance and to build o^prev.

Shape legend: L layers, R rows of a packed batch, B sequences, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from das_ds.functional.units import Importance
from das_ds.kernels.unit_gate import measure_gate, unit_gate
from das_ds.models.adapter import ArchitectureAdapter

Gate = Callable[[torch.Tensor], torch.Tensor]


class UnitGates:
    """Adds the gates of one model by hooks and takes them away again."""

    def __init__(self, model: PreTrainedModel, adapter: ArchitectureAdapter) -> None:
        self._sites = list(adapter.gate_modules(model))

    @contextmanager
    def active(self, gates: Importance, first_row: int = 0) -> Iterator[None]:
        """Multiply unit outputs of rows >= first_row by `gates` (group -> (L, 1 or rows, U)).

        The backward pass belongs inside the context too: activation checkpointing runs the layers again there.
        """
        with self._hooked(lambda group, layer: lambda x: unit_gate(x, gates[group][layer], first_row)):
            yield

    @contextmanager
    def measuring(self, sums: Importance, row_weights: torch.Tensor, num_views: int = 1) -> Iterator[torch.Tensor]:
        """Gates of ones, whose gradients the backward pass adds up: see `kernels.unit_gate.measure_gate`.

        Args:
            sums: group -> (L, B, U) float32, added to.
            row_weights: (B,) float32.
            num_views: the batch that passes the model has this many rows for each of the B sequences.

        Yields:
            The scalar to differentiate by: `torch.autograd.grad(loss, anchor)`, inside the context.
        """
        anchor = torch.zeros((), device=row_weights.device, requires_grad=True)
        measure = lambda group, layer: lambda x: measure_gate(x, anchor, sums[group][layer], row_weights, num_views)  # noqa: E731
        with self._hooked(measure):
            yield anchor

    @contextmanager
    def _hooked(self, gate_of: Callable[[str, int], Gate]) -> Iterator[None]:
        handles = [_add(module, site.position, gate_of(site.group, layer)) for site, layer, module in self._sites]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _add(module: nn.Module, position: str, gate: Gate) -> torch.utils.hooks.RemovableHandle:
    if position == "input":
        return module.register_forward_pre_hook(lambda _, inputs: (gate(inputs[0]), *inputs[1:]))
    return module.register_forward_hook(lambda _, __, output: gate(output))
