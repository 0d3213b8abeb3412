"""What the gradient of one batch says about the importance of what it was taken by: a weight, or a unit's gate."""

from __future__ import annotations

import torch

from das_ds.config import ImportanceKind


def contribution(gradient: torch.Tensor, weight: torch.Tensor | float, kind: ImportanceKind) -> torch.Tensor:
    """The summand of one batch; importance before normalisation is its sum over batches.

        magnitude     |g|          DAS: Ke et al., ICLR 2023, eq. 2; SPG: Konishi et al., ICML 2023
        square        g^2          diagonal of the empirical Fisher matrix (Kirkpatrick et al., PNAS 2017)
        sensitivity   |g * theta|  |dL/dc| of a gate c = 1 on the weight (SNIP: Lee et al., ICLR 2019, eq. 4)

    A unit's gate is such a c, with theta = 1: there `sensitivity` is `magnitude`.

    Args:
        gradient: dL/dtheta of the mean loss of a batch, any shape and floating dtype.
        weight: theta, in full precision, shaped like the gradient.
        kind: what is summed.

    Returns:
        Values >= 0, shaped like the gradient.
    """
    match kind:
        case "magnitude":
            return gradient.abs()
        case "square":
            return gradient.square()
        case "sensitivity":
            return (gradient * weight).abs_()
