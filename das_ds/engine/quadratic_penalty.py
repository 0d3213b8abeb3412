"""Quadratic penalty on the weights; its gradient is added shard by shard between the backward pass and the step.

Shape legend: F elements of a flat tensor of the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from deepspeed import DeepSpeedEngine

from das_ds.distributed.collectives import world_size
from das_ds.distributed.state import Flats, Shard
from das_ds.engine.loss_scaler import LossScaler
from das_ds.engine.zero import get_gradients

CHUNK_ELEMENTS = 1 << 24
"""Elements whose gradient exists at a time, unless one shard has more."""


class QuadraticPenalty:
    """strength / 2 * sum_i c_i (theta_i - a_i)^2 over all weights, with curvature c and anchor a.

    Not part of the autograd graph: no rank ever has all of c or a, and gradients are touched once per optimizer step,
    however many micro-steps it has.

    Args:
        engine: the engine whose gradients are changed.
        shards: this rank's shards.
        parameters: name -> parameter.
        loss_scale: what DeepSpeed multiplies gradients by.
        strength: factor of the penalty.
        curvature: flat tensor -> (F,) float32, read at every step; None: 1 for every weight.
        anchor: flat tensor -> (F,) float32, read at every step.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        shards: list[Shard],
        parameters: dict[str, torch.nn.Parameter],
        loss_scale: LossScaler,
        strength: float,
        curvature: Flats | None,
        anchor: Flats,
    ) -> None:
        self._engine = engine
        self._loss_scale = loss_scale
        self._strength = strength
        self._curvature = curvature
        self._anchor = anchor
        self._chunks = list(_split_into_chunks(shards))
        ordered = [shard for chunk in self._chunks for shard in chunk.shards]
        self._gradients = get_gradients(engine, ordered, parameters)
        # At stage 0 every rank has all weights; at others the sum of the ranks' shares is to be their mean.
        self._num_shares = world_size() if engine.zero_optimization_stage() > 0 else 1

    def add_gradient(self) -> torch.Tensor:
        """gradient <- gradient + strength * c * (theta - a); the sum is clipped.

        Returns:
            Scalar float32 on the engine's device, whose mean over ranks is the penalty; no host-device sync.
        """
        # One gradient (n,) per shard, in the order of the chunks.
        gradients = iter(self._gradients())
        total = torch.zeros((), device=self._engine.device)
        for chunk in self._chunks:
            span = chunk.span
            weights = chunk.flat.data.view(-1)[span]
            distance = weights - self._anchor[chunk.flat][span]
            pull = distance.clone() if self._curvature is None else self._curvature[chunk.flat][span] * distance
            # Under offload the shards are on the host and the total on the device.
            total += torch.dot(pull, distance).to(total.device, non_blocking=True)
            pull *= self._strength * self._loss_scale.value
            # DeepSpeed keeps each shard's gradient in its own tensor; one call adds to all of a chunk.
            targets = list(islice(gradients, len(chunk.shards)))
            pulls = [pull[shard.within(span)] for shard in chunk.shards]
            torch._foreach_add_(targets, [p.to(g.device) for p, g in zip(pulls, targets, strict=True)])
        return total * (0.5 * self._strength * self._num_shares)


@dataclass(frozen=True)
class _Chunk:
    """Shards that lie side by side in one flat tensor."""

    flat: torch.Tensor
    shards: list[Shard]

    @property
    def span(self) -> slice:
        """From the first element of the first shard to the last of the last."""
        return slice(self.shards[0].span.start, self.shards[-1].span.stop)


def _split_into_chunks(shards: list[Shard]) -> Iterator[_Chunk]:
    """Groups of at most `CHUNK_ELEMENTS` elements, or of one shard."""
    by_flat: dict[torch.Tensor, list[Shard]] = {}
    for shard in shards:
        by_flat.setdefault(shard.flat, []).append(shard)
    for flat, neighbors in by_flat.items():
        chunk: list[Shard] = []
        for shard in sorted(neighbors, key=lambda shard: shard.flat_start):
            if chunk and shard.span.stop - chunk[0].span.start > CHUNK_ELEMENTS:
                yield _Chunk(flat, chunk)
                chunk = []
            chunk.append(shard)
        yield _Chunk(flat, chunk)
