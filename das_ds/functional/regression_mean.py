"""Regression mean: the linear layer that comes nearest to two others on the inputs of each (Jin et al., ICLR 2023).

Shape legend: d width of the input of a linear layer, o of its output.
"""

from __future__ import annotations

import torch

from das_ds.functional.projectors import ExactMap

PRECISION = torch.finfo(torch.float32).eps
"""Of moments: what is smaller than this part of the trace has no digits."""


def merging_map(
    earlier: torch.Tensor, latest: torch.Tensor, off_diagonal: float, device: torch.device | None = None
) -> ExactMap:
    """R = M (M + A)^-1, by which W + (W_old - W) R is the regression mean of a layer before and after a domain:

        W + (W_old - W) R = (W_old M + W A) (M + A)^-1

    It minimizes sum_k E|W x - W_k x|^2 over the domains k whose moments are in M, and the last one, where
    `off_diagonal` is 1. All moments have their off-diagonal entries times `off_diagonal` (alpha of Jin et al., section
    3.3), which makes their sum positive definite below 1.

    At 1 the sum may be singular, or not quite positive where it was rounded. So the solver sees
    M + A + r diag(M + A), with r = d times the precision of float32: a ridge that is relative to the trace once every
    element is measured in units of its own size. It counts as part of A. An element of the input that is zero in all
    domains gets r itself; R is 0 there, so that W is kept.

    Memory: `merging_work_bytes`.

    Args:
        earlier: M, (d, d), a sum of second moments, on any device.
        latest: A, (d, d), the second moment of the last domain, as M's are normalized.
        off_diagonal: factor of entries off the diagonal, above 0 and at most 1.
        device: where R is computed and returned; None: where M is.
    """
    before = _shrink(earlier, off_diagonal, device or earlier.device)
    total = _shrink(latest, off_diagonal, before.device).add_(before)
    sizes = total.diagonal().clamp_min(0.0).sqrt()
    sizes = torch.where(sizes > 0.0, sizes, 1.0)
    total.div_(sizes[:, None]).div_(sizes)
    # The trace is d now, or less where elements are zero.
    total.diagonal().add_(PRECISION * len(total))
    mapped = torch.linalg.solve(total, before.div_(sizes), left=False)
    return ExactMap(mapped.div_(sizes).contiguous())


def merging_work_bytes(width: int) -> int:
    """The most bytes on its device while R is computed: five float64 matrices, M and M + A, the factors, R, a copy."""
    return 5 * 8 * width**2


def _shrink(moment: torch.Tensor, off_diagonal: float, device: torch.device) -> torch.Tensor:
    """A new float64 matrix with the entries off the diagonal times a factor."""
    shrunk = moment.to(device).to(torch.float64, copy=True)
    energies = shrunk.diagonal().clone()
    shrunk.mul_(off_diagonal).diagonal().copy_(energies)
    return shrunk
