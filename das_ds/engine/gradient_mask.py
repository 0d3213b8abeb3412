"""Element-wise gradient mask, the published form of the soft mask: gradients times 1 - I before they are clipped."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from das_ds.distributed.state import Shard
from das_ds.engine.mask import ElementwiseMasks
from das_ds.kernels.masked_scale import MaskedScale


class ElementwiseGradientMask:
    """A `GradientMask` that scales all gradients of this rank in one launch.

    The mask is the same for all micro-steps and ranks, so scaling their sum is scaling each.

    Args:
        shards: this rank's.
        masks: one for every flat tensor that the shards lie in.
    """

    def __init__(self, shards: Sequence[Shard], masks: ElementwiseMasks) -> None:
        # DeepSpeed keeps the gradient of each shard in its own tensor.
        self._scale = MaskedScale([masks[shard.flat].protection.crop(shard.span) for shard in shards])

    def apply_(self, gradients: Sequence[torch.Tensor]) -> None:
        """gradient <- (1 - I) * gradient."""
        self._scale(gradients)
