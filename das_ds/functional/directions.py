"""Soft masks of directions: how much of a matrix's update each direction of its input lets through.

Shape legend: d width of the input of a linear layer, o of its output.
"""

from __future__ import annotations

import torch


def relative_moment(moment: torch.Tensor) -> torch.Tensor:
    """M = A / (tr(A) / d): the second moment of an input, relative to its mean over directions.

    Args:
        moment: (d, d), A = E[x x^T], symmetric.

    Returns:
        (d, d) float32 with trace d; 0 where nothing came in.
    """
    mean = moment.diagonal().double().mean()
    return torch.where(mean > 0, moment.double() / mean, 0.0).float()


def direction_mask(relative: torch.Tensor, saturation: float) -> torch.Tensor:
    """P = (I + M / c)^-1, by which every row of an update dW (o, d) is multiplied: dW <- dW P.

    In the eigenvectors of M, which belong to shares a of the input's energy, that is the mask 1 - I with the saturating
    importance I = a / (a + c): `functional.normalisation.saturating` where what is important is a direction and not a
    weight. With A A^T in place of M it is I - A (A^T A + alpha I)^-1 A^T, the projector of orthogonal weight
    modification (Zeng et al., Continual learning of context-dependent processing in neural networks, Nature Machine
    Intelligence 2019), whose alpha is small; gradient projection memory (Saha et al., ICLR 2021) gives the largest
    directions 0 and all others 1.

    Args:
        relative: (d, d), M; of several domains their sum.
        saturation: c; at c = 0 only directions that never came in would learn, without limit all learn freely.

    Returns:
        (d, d) float32, symmetric, with eigenvalues in (0, 1].
    """
    identity = torch.eye(len(relative), dtype=torch.float64, device=relative.device)
    factor = torch.linalg.cholesky(identity + relative.double() / saturation)
    return torch.cholesky_inverse(factor).float()
