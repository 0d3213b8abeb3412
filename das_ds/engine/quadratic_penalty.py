"""A quadratic penalty on weights, whose gradient is added in the shards between the backward pass and the step.

Shape legend: F elements of a flat tensor of the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from deepspeed import DeepSpeedEngine

from das_ds.distributed.collectives import world_size
from das_ds.distributed.state import Flats, Shard
from das_ds.engine.loss_scaler import LossScaler
from das_ds.engine.zero import get_gradients

CHUNK_ELEMENTS = 1 << 24
"""Elements whose pull exists at a time, unless one shard has more."""


class QuadraticPenalty:
    """strength / 2 * sum_i c_i (theta_i - a_i)^2 over all weights, c being a curvature and a an anchor.

    No part of the autograd graph: no rank ever has the whole of c or a, and gradients are touched once per optimizer
    step, however many micro-steps it has.

    Args:
        engine: the engine whose gradients are meant.
        shards: this rank's shards.
        parameters: name -> parameter.
        loss_scale: what DeepSpeed multiplies gradients by.
        strength: factor of the penalty.
        curvature, anchor: flat tensor -> (F,) float32 beside it; read at every step.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        shards: list[Shard],
        parameters: dict[str, torch.nn.Parameter],
        loss_scale: LossScaler,
        strength: float,
        curvature: Flats,
        anchor: Flats,
    ) -> None:
        self._engine, self._loss_scale, self._strength = engine, loss_scale, strength
        self._curvature, self._anchor = curvature, anchor
        self._chunks = list(_chunks(shards))
        ordered = [shard for chunk in self._chunks for shard in chunk]
        self._gradients = get_gradients(engine, ordered, parameters)
        # At stage 0 every rank has all weights, at others the mean over ranks is to be the sum of their parts.
        self._parts = world_size() if engine.zero_optimization_stage() > 0 else 1

    def add_gradient(self) -> torch.Tensor:
        """gradient <- gradient + strength * c * (theta - a), which is clipped as a whole.

        Returns:
            Scalar float32 on the engine's device, whose mean over ranks is the penalty; nobody waits for it.
        """
        gradients, first = self._gradients(), 0
        total = torch.zeros((), device=self._engine.device)
        for chunk in self._chunks:
            flat, start, stop = chunk[0].flat, chunk[0].start, chunk[-1].start + chunk[-1].numel
            distance = flat.data.view(-1)[start:stop] - self._anchor[flat][start:stop]
            pull = self._curvature[flat][start:stop] * distance
            total += torch.dot(pull, distance).to(total.device, non_blocking=True)
            pull *= self._strength * self._loss_scale.value
            targets = gradients[first : first + len(chunk)]
            pulls = [pull[s.start - start : s.start - start + s.numel] for s in chunk]
            torch._foreach_add_(targets, [p.to(g.device) for p, g in zip(pulls, targets, strict=True)])
            first += len(chunk)
        return total * (0.5 * self._strength * self._parts)


def _chunks(shards: list[Shard]) -> Iterator[list[Shard]]:
    """Shards of one flat tensor, side by side, in groups of at most `CHUNK_ELEMENTS` or of one."""
    by_flat: dict[torch.Tensor, list[Shard]] = {}
    for shard in shards:
        by_flat.setdefault(shard.flat, []).append(shard)
    for neighbours in by_flat.values():
        chunk: list[Shard] = []
        for shard in sorted(neighbours, key=lambda shard: shard.start):
            if chunk and shard.start + shard.numel - chunk[0].start > CHUNK_ELEMENTS:
                yield chunk
                chunk = []
            chunk.append(shard)
        yield chunk
