"""What flows where between the linear maps of one layer, seen by running it.

The output of every linear map is cut off from the graph, so that a gradient at the input of one map reaches the maps
that feed it directly and none behind them.

Shape legend: R rows, S positions, A features that a map gives, F features that it takes, U units.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from das_ds.models.inspect.probe import LENGTH, NUM_ROWS, VOCABULARY_SIZE, probe_ids


@dataclass(frozen=True, eq=False)
class TracedLinear:
    """One linear map of the layer in one forward pass."""

    name: str
    """Relative to the layer."""
    module: nn.Module
    taken: torch.Tensor
    """Its input, (R, S, F) or with rows and positions flattened."""
    given: torch.Tensor
    """A copy of its output (..., A) that has no history."""

    @property
    def is_transposed(self) -> bool:
        """Whether the rows of the stored weight are inputs."""
        return isinstance(self.module, Conv1D)

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """(F, A)."""
        return self.taken.shape[-1], self.given.shape[-1]


@dataclass(frozen=True)
class LayerFlow:
    """The linear maps of a layer in the order in which they ran."""

    maps: tuple[TracedLinear, ...]
    repeated: tuple[str, ...]
    """Maps that ran several times in one pass; they are not among `maps`."""
    idle: tuple[str, ...]
    """Maps that did not run."""
    mixing: tuple[str, ...]
    """Maps whose input at one position depends on the token at another."""

    def reachable_units(self, consumer: TracedLinear, num_units: int, units: list[int]) -> dict[str, torch.Tensor]:
        """Which features of every feeding map reach each of the units that the consumer's input divides into.

        Returns:
            Name of a feeding map -> (len(units), A) bool; maps without influence are left out.
        """
        feeders = [item for item in self.maps if item is not consumer]
        noise = torch.randn(consumer.taken.shape, generator=torch.Generator().manual_seed(0))
        by_unit = (consumer.taken * noise).reshape(-1, num_units, consumer.taken.shape[-1] // num_units).sum(dim=(0, 2))
        if not by_unit.requires_grad:
            return {}
        found: dict[str, list[torch.Tensor]] = {item.name: [] for item in feeders}
        for unit in units:
            gradients = torch.autograd.grad(
                by_unit[unit], [item.given for item in feeders], retain_graph=True, materialize_grads=True
            )
            for item, gradient in zip(feeders, gradients, strict=True):
                found[item.name].append(gradient.flatten(0, -2).ne(0).any(dim=0))
        stacked = {name: torch.stack(parts) for name, parts in found.items()}
        return {name: reached for name, reached in stacked.items() if reached.any()}


def trace_layer(model: PreTrainedModel, layer: nn.Module) -> LayerFlow:
    """Run the probe and look at one layer, the first: what enters it has not yet mixed positions."""
    names: dict[nn.Module, str] = {
        module: name for name, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    ids = probe_ids(model)
    runs: list[TracedLinear] = []
    with _recorded(names, runs, cut=True):
        model(ids)
    plain: list[TracedLinear] = []
    changed: list[TracedLinear] = []
    other = ids.clone()
    # The neighbor of the last position: sliding windows may hide all that is further away.
    other[:, -2] = 5 + (ids[:, -2] - 4) % (VOCABULARY_SIZE - 5)
    with torch.no_grad():
        for tokens, seen in ((ids, plain), (other, changed)):
            with _recorded(names, seen, cut=False):
                model(tokens)
    ran = [item.name for item in runs]
    once = tuple(item for item in runs if ran.count(item.name) == 1)
    mixing = tuple(
        before.name for before, after in zip(plain, changed, strict=False) if _differ_at_the_end(before, after)
    )
    return LayerFlow(
        once,
        tuple(dict.fromkeys(name for name in ran if ran.count(name) > 1)),
        tuple(name for name in names.values() if name not in ran),
        mixing,
    )


def _differ_at_the_end(before: TracedLinear, after: TracedLinear) -> bool:
    if before.name != after.name or before.taken.shape != after.taken.shape:
        return True
    if before.taken.numel() != NUM_ROWS * LENGTH * before.taken.shape[-1]:
        return not torch.equal(before.taken, after.taken)
    ends = [item.taken.reshape(NUM_ROWS, LENGTH, -1)[:, -1] for item in (before, after)]
    return not torch.equal(*ends)


@contextmanager
def _recorded(names: dict[nn.Module, str], runs: list[TracedLinear], *, cut: bool) -> Iterator[None]:
    def record(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        given = output.detach().requires_grad_(cut)
        runs.append(TracedLinear(names[module], module, inputs[0], given))
        # A copy, as some layers add to an output in place.
        return given.clone()

    handles = [module.register_forward_hook(record) for module in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
