"""Weight snapshot: a copy of earlier weights that runs through the same module (DeepSpeed 0.19.8).

A second module under a second engine would double hooks, buffers and the time to build it. Here only the tensors that a
forward pass reads exist twice, in their type and sharded as they are: complete at ZeRO 0 to 2, this rank's shard at
ZeRO 3, which gathers earlier shards exactly as it gathers present ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from deepspeed import DeepSpeedEngine

from das_ds.distributed.state import Flats, Shard
from das_ds.engine.zero import Zero3Swap, is_zero3, refresh_weights


@dataclass(frozen=True)
class _Copy:
    """The copied values of one parameter."""

    values: torch.Tensor
    param_start: int
    """First element of the flattened parameter that is among the values."""


class WeightSnapshot:
    """A copy of the weights as they are now.

    Args:
        engine: whose module runs with them.
        parameters: name -> parameter that may change; others need no copy.
        shards: this rank's shards of them.
    """

    def __init__(
        self, engine: DeepSpeedEngine, parameters: dict[str, torch.nn.Parameter], shards: Sequence[Shard]
    ) -> None:
        self._shards = shards
        # Under ZeRO-3 this also gathers the small parameters that stay gathered.
        refresh_weights(engine)
        owners = list(parameters.values())
        self._swap: Zero3Swap | None = None
        readable: Sequence[torch.Tensor] = owners
        param_starts = [0] * len(owners)
        persistent: Sequence[torch.Tensor] = ()
        if is_zero3(engine):
            self._swap = Zero3Swap(engine, owners)
            readable, param_starts = self._swap.shards()
            persistent = self._swap.persistent
        copies = [tensor.detach().clone() for tensor in readable]
        self._copies = {
            name: _Copy(values, param_start)
            for name, values, param_start in zip(parameters, copies, param_starts, strict=True)
        }
        # A persistent parameter has two tensors: the shard that is stepped and the complete one that is read.
        self._live = [*readable, *persistent]
        self._earlier = [*copies, *(parameter.detach().clone() for parameter in persistent)]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the module computes with these weights; for complete passes without gradients.

        Pointers are exchanged, nothing is copied. The module must hold the present weights on entry, and no graph of
        the present weights may still wait for its backward pass.
        """
        present = [tensor.data for tensor in self._live]
        if self._swap is not None:
            self._swap.begin()
        _point_to(self._live, self._earlier)
        try:
            yield
        finally:
            _point_to(self._live, present)
            if self._swap is not None:
                self._swap.end()

    def flats(self) -> Flats:
        """These weights by the flat tensors of the optimizer, in their own type, for a checkpoint."""
        result: Flats = {}
        for shard in self._shards:
            earlier = self._copies[shard.name]
            if shard.flat not in result:
                result[shard.flat] = earlier.values.new_zeros(shard.flat.numel())
            first = shard.param_start - earlier.param_start
            result[shard.flat][shard.span] = earlier.values.view(-1)[first : first + shard.numel]
        return result


def _point_to(tensors: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data = value
