"""Norms of the averaged gradient by group of parameters, for the logged steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from das_ds.distributed.collectives import all_reduce_sum
from das_ds.distributed.state import Shard
from das_ds.engine.gradient_norm import total_norm


class GroupNorms:
    """Norm of each group, over all ranks, of gradients that lie in shards.

    Args:
        shards: this rank's, in the order of their gradients.
        groups: parameter -> group, of all that are trained.
        is_sharded: whether every rank has other gradients (ZeRO 1 to 3), or all have the same.
    """

    def __init__(self, shards: Sequence[Shard], groups: Mapping[str, str], *, is_sharded: bool) -> None:
        self.names = list(dict.fromkeys(groups.values()))
        """In the order of the parameters."""
        numbers: dict[str, list[int]] = {name: [] for name in self.names}
        for number, shard in enumerate(shards):
            numbers[groups[shard.name]].append(number)
        self._numbers = list(numbers.values())
        self._is_sharded = is_sharded

    def measure(self, gradients: Sequence[torch.Tensor], loss_scale: float) -> dict[str, float]:
        """Group -> norm; a collective, and it waits for the device.

        Args:
            gradients: of the shards.
            loss_scale: by which they are multiplied.
        """
        norms = torch.stack([total_norm([gradients[i] for i in group]).double() for group in self._numbers])
        squares = norms.to(gradients[0].device).square()
        if self._is_sharded:
            all_reduce_sum(squares)
        return dict(zip(self.names, (squares.sqrt() / loss_scale).tolist(), strict=True))
