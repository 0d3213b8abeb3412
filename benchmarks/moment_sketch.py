"""Sketches of second moments: the largest eigenvalues of M (d, d), from a matrix (d, l) that inputs could be added to.

    Y = A Omega,  A = sum of x x^T;  A is about Y (Omega^T Y)^+ Y^T  (Nystroem)

Y is linear in A: sketches with the same Omega are added over batches, ranks and domains as moments are. On average the
error in the nuclear norm is at most 1 + r / (l - r - 1) times that of the best approximation of rank r (Tropp et al.,
Fixed-rank approximation of a positive-semidefinite matrix from streaming data, NeurIPS 2017). `direction_rank` compares
masks from sketches with the exact ones; das_ds has only these.

Shape legend: d width of an input, l columns of the sketch, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLING = 32
"""l - r: columns of the sketch beyond the rank."""
ROUNDING = 4.0 * torch.finfo(torch.float32).eps
"""Of sums in float32, relative to the largest eigenvalue; what the shift of `decompose_sketch` must exceed."""
MAX_SHIFTS = 8
"""Tenfold increases of that shift; the last is larger than the largest eigenvalue."""


def random_signs(width: int, num_columns: int, seed: int = 0) -> Tensor:
    """Omega (d, l) float32 of independent random signs, which give the same errors as Gaussian numbers."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, (width, num_columns), generator=generator) * 2 - 1).float()


def decompose_sketch(signs: Tensor, products: Tensor, trace: float, rank: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of the Nystroem approximation, which are never above those of A, and their vectors.

    As Algorithm 3 of Tropp et al.: A + nu I is approximated, with nu a little above the rounding of Y, so that a
    Cholesky factor exists, and nu is taken off the eigenvalues.

    Args:
        signs: Omega, (d, l) float32.
        products: Y, (d, l) float32, of a second moment.
        trace: tr A.
        rank: at most l - `OVERSAMPLING`.

    Returns:
        (r,) float64 in descending order, and (d, r) float64; fewer than `rank` where A has fewer above the rounding of
        Y.
    """
    assert 1 <= rank <= signs.shape[1] - OVERSAMPLING, f"found rank {rank} of a sketch of {signs.shape[1]} columns"
    num_columns = signs.shape[1]
    signs = signs.double()
    products = products.double()
    # |Y| is about the square root of l times the norm of A.
    shift = ROUNDING * float(products.norm()) / num_columns**0.5
    for _ in range(MAX_SHIFTS):
        root = _square_root(products + shift * signs, signs)
        # Noise over a vanishing pivot gives eigenvalues that A cannot have; a larger shift is above the noise.
        if root is not None and float(root.square().sum()) - shift * num_columns <= 1.001 * trace:
            return _eigenpairs(root, shift, rank)
        shift *= 10.0
    raise ValueError(f"sketch: found products that no second moment with a trace of {trace:.3g} has")


def _square_root(products: Tensor, signs: Tensor) -> Tensor | None:
    """E (d, l) with E E^T = Y (Omega^T Y)^-1 Y^T; None where Omega^T Y is not positive definite."""
    core = signs.T @ products
    factor, failed = torch.linalg.cholesky_ex((core + core.T) / 2.0, upper=True)
    if failed:
        return None
    return torch.linalg.solve_triangular(factor, products, upper=True, left=False)


def _eigenpairs(root: Tensor, shift: float, rank: int) -> tuple[Tensor, Tensor]:
    """Those of E E^T - nu I, by those of E^T E (l, l), which is smaller."""
    eigenvalues, vectors = torch.linalg.eigh(root.T @ root)
    largest_first = torch.arange(len(eigenvalues) - 1, len(eigenvalues) - 1 - rank, -1)
    kept = largest_first[eigenvalues[largest_first] > 2.0 * shift]
    scales = eigenvalues[kept].sqrt()
    return eigenvalues[kept] - shift, root @ vectors[:, kept] / scales
