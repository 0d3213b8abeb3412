"""Sharded fp32 weights of an engine: read, gather, change, snapshot and restore them.

Shape legend: F elements of a flat tensor of the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import torch
from deepspeed import DeepSpeedEngine
from torch import nn

from das_ds.distributed.process_group import ProcessGroup
from das_ds.distributed.state import Flats, Shard
from das_ds.engine.sharded_init import Slice
from das_ds.engine.weight_snapshot import WeightSnapshot
from das_ds.engine.zero import (
    flats_by_parameter,
    full_fp32_weight,
    full_numel,
    gathered_weights,
    refresh_weights,
    release_gathered_weights,
    shards,
)


class ShardedWeights:
    """The trained weights as the optimizer steps them: fp32, sharded over the ranks from ZeRO stage 1 on.

    Args:
        engine: DeepSpeed's.
        parameters: name -> parameter of everything that is trained.
        ranks: the process group.
        on_weights_will_change: called before weights are written.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        parameters: dict[str, nn.Parameter],
        ranks: ProcessGroup,
        on_weights_will_change: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._parameters = parameters
        self._names = {parameter: name for name, parameter in parameters.items()}
        self._ranks = ranks
        self._on_weights_will_change = on_weights_will_change
        self.shards: list[Shard] = list(shards(engine, self._names))
        """This rank's shards, at most one per parameter."""

    @cached_property
    def named_shards(self) -> dict[str, Shard]:
        """Parameter -> this rank's shard, of the parameters that it has a shard of."""
        named = {shard.name: shard for shard in self.shards}
        assert len(named) == len(self.shards), "a rank has one shard of a parameter"
        return named

    def flats(self) -> Flats:
        """Flat tensor -> (F,) view of its fp32 weights, for reading."""
        return {shard.flat: shard.flat.data.view(-1) for shard in self.shards}

    def flats_by_parameter(self) -> dict[str, torch.Tensor]:
        """Parameter -> the flat tensor that it is stepped in, also where this rank has no shard of it."""
        return flats_by_parameter(self._engine, self._names)

    @contextmanager
    def writable_flats(self) -> Iterator[Flats]:
        """Flat tensor -> (F,) view of its fp32 weights, for writing; afterwards the forward pass reads the new ones."""
        self._on_weights_will_change()
        yield self.flats()
        refresh_weights(self._engine)

    def numels(self) -> dict[str, int]:
        """Parameter -> number of elements on all ranks."""
        return {name: full_numel(parameter) for name, parameter in self._parameters.items()}

    def fp32_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, complete fp32 weight) of every parameter in turn, on every rank; a collective per parameter."""
        for name in self._parameters:
            yield name, self.fp32_weight(name)

    def fp32_weight(self, name: str) -> torch.Tensor:
        """The complete fp32 weight of a parameter, on every rank; a collective."""
        return full_fp32_weight(self._engine, self._parameters[name])

    def map_weights(self, names: Iterable[str], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace each named weight by `change(weight)`, complete, in fp32, on the host; a collective per parameter.

        Args:
            names: the same on every rank.
            change: weight -> weight of the same shape, with the same result on every rank; does not write its input.
        """
        self._on_weights_will_change()
        for name in names:
            changed = change(self.fp32_weight(name).cpu()).view(-1)
            shard = self.named_shards.get(name)
            if shard is not None:
                shard.values.copy_(changed[shard.param_span])
        refresh_weights(self._engine)

    def set_exact(self, exact: dict[str, Slice]) -> None:
        """Replace the fp32 weights that DeepSpeed made of rounded ones, before the first step.

        Args:
            exact: parameter -> values that contain this rank's shard; used up, so that each is freed in turn.
        """
        for shard in self.shards:
            if shard.name in exact:
                own = exact.pop(shard.name)
                first = shard.param_start - own.offset
                shard.values.copy_(own.values[first : first + shard.numel])

    def snapshot(self) -> list[torch.Tensor]:
        """Copies of this rank's fp32 shards in host memory, for `restore`."""
        return [shard.values.cpu().clone() for shard in self.shards]

    def restore(self, snapshot: list[torch.Tensor]) -> None:
        """Restore all weights from a snapshot."""
        self._on_weights_will_change()
        for shard, saved in zip(self.shards, snapshot, strict=True):
            shard.values.copy_(saved)
        refresh_weights(self._engine)

    def load(self, saved: Flats) -> None:
        """Replace all weights by saved ones, flat tensor -> (F,) values of any float type."""
        self._on_weights_will_change()
        for flat, values in saved.items():
            flat.data.view(-1).copy_(values)
        refresh_weights(self._engine)

    def weight_snapshot(self, saved: Flats | None = None) -> WeightSnapshot:
        """A copy of the weights that can be run later in place of the present ones.

        Args:
            saved: the weights to copy, from `WeightSnapshot.flats`; None: the present ones.
        """
        if saved is None:
            return WeightSnapshot(self._engine, self._parameters, self.shards)
        # The copy is made of what the forward pass reads, which has to be the saved weights for that moment.
        present = self.snapshot()
        self._on_weights_will_change()
        for flat, values in saved.items():
            flat.data.view(-1).copy_(values)
        earlier = WeightSnapshot(self._engine, self._parameters, self.shards)
        self.restore(present)
        return earlier

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, every rank has all weights, so that passes without gradients gather none; a collective at ZeRO 3."""
        with gathered_weights(self._engine):
            yield

    def release_gathered(self) -> None:
        """Free the weights that ZeRO-3 left gathered; to be called after `torch.autograd.grad` through the module."""
        release_gathered_weights(self._engine)

    def checkpoint_shards(self) -> list[Shard]:
        """This rank's shards of what all ranks store together, every weight once.

        At stage 0, where every rank has everything, each rank stores an equal share of every parameter.
        """
        if self._engine.zero_optimization_stage() > 0:
            return self.shards
        rank = self._ranks.info.rank
        num_ranks = self._ranks.info.world_size
        stored = []
        for shard in self.shards:
            first = shard.numel * rank // num_ranks
            last = shard.numel * (rank + 1) // num_ranks
            if last > first:
                start = shard.flat_start + first
                stored.append(replace(shard, flat_start=start, param_start=first, numel=last - first))
        return stored
