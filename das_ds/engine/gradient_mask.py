"""Gradient mask, the published form of the soft mask: gradients are scaled by 1 - I before they are clipped."""

from __future__ import annotations

import torch
from deepspeed import DeepSpeedEngine

from das_ds.distributed.state import Shard
from das_ds.engine.mask import ElementwiseMasks
from das_ds.engine.zero import get_gradients
from das_ds.kernels.masked_scale import MaskedScale


class GradientMask:
    """Scales this rank's averaged gradients between the backward pass and the step, all in one launch.

    The mask is the same for all micro-steps and ranks, so scaling their sum is scaling each.

    Args:
        engine: the engine whose gradients are scaled.
        shards: this rank's shards.
        parameters: name -> parameter.
        masks: one for every flat tensor that the shards lie in.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        shards: list[Shard],
        parameters: dict[str, torch.nn.Parameter],
        masks: ElementwiseMasks,
    ) -> None:
        self._gradients = get_gradients(engine, shards, parameters)
        # DeepSpeed keeps the gradient of each shard in its own tensor.
        self._scale = MaskedScale([masks[shard.flat].protection.crop(shard.span) for shard in shards])

    def apply(self) -> None:
        """gradient <- (1 - I) * gradient, before the norm of the result is measured for clipping."""
        self._scale(self._gradients())
