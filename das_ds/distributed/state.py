"""What one rank needs in order to continue, sorted by how it is divided over the ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Flats = dict[torch.Tensor, torch.Tensor]
"""Flat tensor of the optimizer -> a value for each of its F elements."""


@dataclass(frozen=True)
class Shard:
    """What this rank's optimizer steps of one parameter: a range of the parameter that lies in a flat tensor."""

    name: str
    flat: torch.Tensor
    """The float32 tensor that DeepSpeed hands to the base optimizer."""
    flat_start: int
    """First element within `flat` (flattened)."""
    param_start: int
    """First element within the flattened parameter."""
    numel: int

    @property
    def span(self) -> slice:
        """Where the shard lies in the flat tensor."""
        return slice(self.flat_start, self.flat_start + self.numel)

    @property
    def param_span(self) -> slice:
        """Which elements of the flattened parameter it holds."""
        return slice(self.param_start, self.param_start + self.numel)

    @property
    def values(self) -> torch.Tensor:
        """(numel,) view of the shard's fp32 values."""
        return self.flat.data.view(-1)[self.span]

    def within(self, span: slice) -> slice:
        """Where the shard lies in a slice of the flat tensor that contains it."""
        return slice(self.flat_start - span.start, self.flat_start - span.start + self.numel)


def zeros_by_flat(shards: Iterable[Shard], dtype: torch.dtype) -> dict[torch.Tensor, torch.Tensor]:
    """One tensor of zeros (F,) per flat tensor that the shards lie in, on its device."""
    return {shard.flat: torch.zeros(shard.flat.numel(), dtype=dtype, device=shard.flat.device) for shard in shards}


@dataclass(frozen=True)
class ComponentState:
    """Everything of one part of the program (engine, method ...) that a checkpoint has to hold."""

    sharded: dict[str, Flats] = field(default_factory=dict)
    """Values by weight (weights, moments, importance), divided like the optimizer; fits any number of ranks."""
    shared: dict[str, torch.Tensor] = field(default_factory=dict)
    """Equal on every rank."""
    local: dict[str, torch.Tensor] = field(default_factory=dict)
    """This rank's alone; another number of ranks, or another ZeRO stage, can read only those of all ranks."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """What JSON can hold, equal on every rank."""


class SavedComponentState(Protocol):
    """One part's state as a checkpoint gives it back."""

    @property
    def numbers(self) -> dict[str, Any]:
        """As saved."""

    def has_sharded(self, name: str) -> bool:
        """Whether values by weight were saved under this name."""

    def sizes(self, name: str) -> dict[str, int]:
        """Parameter -> number of its values that were saved under this name, by all ranks together."""

    def sharded(self, name: str) -> Flats:
        """Values by weight for this rank's flat tensors, on their devices; 0 where a weight had none.

        Flat tensors of which nothing was saved are left out.
        """

    def shared(self) -> dict[str, torch.Tensor]:
        """What was equal on every rank, in host memory."""

    def local(self) -> dict[str, torch.Tensor]:
        """This rank's own tensors, in host memory; none where ranks or stage are not those of the checkpoint."""

    def every_local(self, name: str) -> list[torch.Tensor]:
        """The own tensors of this name of all ranks that wrote, in their order, in host memory."""
