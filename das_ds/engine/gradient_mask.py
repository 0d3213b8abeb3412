"""The published form of the soft mask: gradients are scaled by 1 - I before they are clipped."""

from __future__ import annotations

import torch
from deepspeed import DeepSpeedEngine

from das_ds.distributed.state import Shard
from das_ds.engine.zero import get_gradients
from das_ds.kernels.masked_scale import MaskedScale
from das_ds.kernels.protection import Protection


class GradientMask:
    """Scales this rank's averaged gradients between the backward pass and the step, all in one launch.

    The mask is the same for all micro-steps and ranks, so scaling their sum is scaling each.

    Args:
        engine: the engine whose gradients are meant.
        shards: this rank's shards.
        parameters: name -> parameter.
        protections: one per shard, of the shard's elements.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        shards: list[Shard],
        parameters: dict[str, torch.nn.Parameter],
        protections: list[Protection],
    ) -> None:
        self._gradients = get_gradients(engine, shards, parameters)
        self._scale = MaskedScale(protections)

    def apply(self) -> None:
        """gradient <- (1 - I) * gradient; they are clipped by the norm of what is left."""
        self._scale(self._gradients())
