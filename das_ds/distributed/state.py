"""State of a run's components as checkpoints hold it, sorted by how ranks share it, and the shards it refers to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Flats = dict[torch.Tensor, torch.Tensor]
"""Flat tensor of the optimizer -> a value for each of its F elements."""


@dataclass(frozen=True)
class Shard:
    """The part of one parameter that this rank's optimizer steps: a range of it that lies in a flat tensor."""

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
        """Its elements of the flattened parameter."""
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
    """Everything that a checkpoint has to hold of one component (engine, method ...)."""

    sharded: dict[str, Flats] = field(default_factory=dict)
    """Values by weight (weights, moments, importance), sharded like the optimizer; loads on any number of ranks."""
    replicated: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tensors that are equal on every rank."""
    rank_local: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tensors of this rank only; another number of ranks, or another ZeRO stage, can only read those of all ranks."""
    owned: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tensors that exactly one rank has, in host memory and never changed afterwards: they are written without a copy,
    each by its owner. Any rank, of any number of ranks, can read any of them."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """JSON values that are equal on every rank."""


class SavedComponentState(Protocol):
    """A component's state as a checkpoint returns it, the counterpart of `ComponentState`."""

    @property
    def metadata(self) -> dict[str, Any]:
        """As saved."""

    def has_sharded(self, name: str) -> bool:
        """Whether values by weight were saved under this name."""

    def sizes(self, name: str) -> dict[str, int]:
        """Parameter -> number of its values that all ranks together saved under this name."""

    def sharded(self, name: str) -> Flats:
        """Values by weight for this rank's flat tensors, on their devices; 0 where a weight had none.

        Flat tensors without any saved value are omitted.
        """

    def replicated(self) -> dict[str, torch.Tensor]:
        """Tensors that were equal on every rank, in host memory."""

    def rank_local(self) -> dict[str, torch.Tensor]:
        """This rank's own tensors, in host memory; none where world size or ZeRO stage differ from the checkpoint."""

    def owned_names(self) -> list[str]:
        """Names of the tensors that one rank each had, those of all ranks, sorted."""

    def owned(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tensors of these names, in host memory of their own; nothing else is read.

        Raises:
            CheckpointError: there is none of that name.
        """

    def all_rank_local(self, name: str) -> list[torch.Tensor]:
        """The tensors of this name that each rank saved, in rank order, in host memory."""


class Stateful(Protocol):
    """A component of a run that checkpoints save and restore; the name and the methods are torch's (DCP `Stateful`)."""

    def state_dict(self) -> ComponentState:
        """State as it is now: views and references, which the checkpointer copies."""

    def load_state_dict(self, saved: SavedComponentState, /) -> None:
        """Restore a saved state; a collective where the component says so."""
