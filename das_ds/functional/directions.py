"""Direction masks (as in orthogonal weight modification): how much of an update each direction of the input takes.

Shape legend: d width of the input of a linear layer, o of its output.
"""

from __future__ import annotations

import torch

NEGLIGIBLE_EIGENVALUE = 1e-5
"""Of M / c, below 0: a mask may exceed 1 by this where rounding made a moment in float32 not quite positive."""


def normalized_second_moment(moment: torch.Tensor) -> torch.Tensor:
    """M = A / (tr(A) / d): the second moment of an input, divided by its mean over directions.

    Args:
        moment: (d, d), A = E[x x^T], symmetric.

    Returns:
        (d, d) float32 with trace d; 0 where all inputs were 0, and not finite where an input was not.
    """
    mean = moment.diagonal().double().mean()
    return torch.where(mean == 0, 0.0, moment.double() / mean).float()


def describe_invalid_moment(moment: torch.Tensor) -> str | None:
    """Why a matrix cannot be a second moment; None: it may be one.

    Every principal minor of order 1 and 2 is checked, up to rounding: m_ii >= 0 and |m_ij|^2 <= m_ii m_jj.

    Args:
        moment: (d, d).
    """
    if not moment.isfinite().all():
        return "an entry that is not finite"
    energies = moment.diagonal()
    if (energies < 0).any():
        return "a negative entry on the diagonal"
    rounding = 1e-4 * float(energies.max())
    if (moment - moment.T).abs().max() > rounding:
        return "a matrix that is not symmetric"
    scales = energies.sqrt()
    if (moment.abs() > torch.outer(scales, scales) + rounding).any():
        return "an entry larger than those on the diagonal allow"
    return None


def direction_projector(relative: torch.Tensor, half_saturation: float) -> torch.Tensor:
    """P = (I + M / c)^-1, by which every row of an update dW (o, d) is multiplied: dW <- dW P.

    In the eigenvectors of M, which belong to shares a of the input's energy, that is the mask 1 - I with the saturating
    importance I = a / (a + c): `functional.importance.saturating` where a direction is important and not a
    weight. With A A^T in place of M it is I - A (A^T A + alpha I)^-1 A^T, the projector of orthogonal weight
    modification (Zeng et al., Continual learning of context-dependent processing in neural networks, Nature Machine
    Intelligence 2019), whose alpha is small; gradient projection memory (Saha et al., ICLR 2021) gives the largest
    directions 0 and all others 1.

    Rounded to float32, M has eigenvalues slightly below 0. Where c is so small that they matter, they are set to 0,
    which needs the eigenvectors; elsewhere a Cholesky factor is enough, in a tenth of the time.

    Args:
        relative: (d, d), M; of several domains their sum.
        half_saturation: c; at c = 0 only directions that never came in would learn, without limit all learn freely.

    Returns:
        (d, d) float32, symmetric, with eigenvalues in (0, 1] up to `NEGLIGIBLE_EIGENVALUE`.
    """
    # M / c, whose eigenvalues must not be below -1 for the Cholesky factor of I + M / c to exist.
    scaled = relative.double() / half_saturation
    identity = torch.eye(len(relative), dtype=torch.float64, device=relative.device)
    _, failed = torch.linalg.cholesky_ex(scaled + NEGLIGIBLE_EIGENVALUE * identity)
    if not failed:
        return torch.cholesky_inverse(torch.linalg.cholesky(identity + scaled)).float()
    shares, vectors = torch.linalg.eigh(scaled)
    mask = (vectors / (1.0 + shares.clamp_min(0.0))) @ vectors.T
    return ((mask + mask.T) / 2.0).float()
