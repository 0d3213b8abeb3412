"""Direction masks (as in orthogonal weight modification): how much of an update each direction of the input takes.

Shape legend: d width of the input of a linear layer, o of its output, r rank, b rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from das_ds.functional.projectors import DenseProjector, LowRankProjector, Projector

Rank = int | Literal["full", "auto"]
"""`full`: P as a matrix; or a number of directions with a factor of their own, which `auto` chooses."""

OverDomains = Literal["sum", "mean"]
"""How the moments of several domains are joined in a mask."""

MAX_FACTOR_ERROR = 0.1
"""Largest error of a factor under rank `auto`, which is the error of P in the spectral norm: what a mask lets through
of any gradient is off by at most a tenth of that gradient."""

NUM_BLOCKS = 16
"""Of columns or rows, in which matrices (d, d) are multiplied or inverted."""

NEGLIGIBLE_EIGENVALUE = 1e-5
"""Of M / c, below 0: a mask may exceed 1 by this where rounding made a moment in float32 not quite positive."""


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


def direction_projector(
    relative: torch.Tensor, half_saturation: float, device: torch.device | None = None
) -> torch.Tensor:
    """P = (I + M / c)^-1, by which every row of an update dW (o, d) is multiplied: dW <- dW P.

    In the eigenvectors of M, which belong to shares a of the input's energy, that is the mask 1 - I with the saturating
    importance I = a / (a + c): `functional.importance.saturating` where a direction is important and not a
    weight. With A A^T in place of M it is I - A (A^T A + alpha I)^-1 A^T, the projector of orthogonal weight
    modification (Zeng et al., Continual learning of context-dependent processing in neural networks, Nature Machine
    Intelligence 2019), whose alpha is small; gradient projection memory (Saha et al., ICLR 2021) gives the largest
    directions 0 and all others 1.

    Rounded to float32, M has eigenvalues slightly below 0. Where c is so small that they matter, they are set to 0,
    which needs the eigenvectors; elsewhere a Cholesky factor is enough, in a tenth of the time.

    Memory: a float64 matrix, in which M and its factor replace each other, and P, `projector_work_bytes`.

    Args:
        relative: (d, d), M; of several domains their sum.
        half_saturation: c; at c = 0 only directions that never came in would learn, without limit all learn freely.
        device: where P is computed and returned; None: where M is.

    Returns:
        (d, d) float32, symmetric, with eigenvalues in (0, 1] up to `NEGLIGIBLE_EIGENVALUE`.
    """
    matrix = _scaled(relative, half_saturation, device)
    # M / c, whose eigenvalues must not be below -1 for the Cholesky factor of I + M / c to exist.
    matrix.diagonal().add_(NEGLIGIBLE_EIGENVALUE)
    if _factorize_(matrix):
        _scaled(relative, half_saturation, device, out=matrix).diagonal().add_(1.0)
        _factorize_(matrix)
        return _inverse(matrix)
    shares, vectors = _decompose_(_scaled(relative, half_saturation, device, out=matrix))
    # P = V S V^T with S = 1 / (1 + a): as the square of V S^(1/2), which is symmetric as computed.
    vectors.mul_((1.0 + shares.clamp_min_(0.0)).rsqrt_())
    return (vectors @ vectors.T).float()


def joint_saturation(moment: torch.Tensor, half_saturation: float, over_domains: OverDomains) -> float:
    """c of P = (I + M / c)^-1 for M as it is kept, the sum over k domains.

    The mask of their mean is (I + (M / k) / c)^-1 = (I + M / (k c))^-1: that of the sum with k c in place of c. Each
    term was divided by tr(A) / d, so that k = tr(M) / d.

    Args:
        moment: (d, d), M.
        half_saturation: c.
        over_domains: whether P is that of the sum or of the mean.
    """
    if over_domains == "sum":
        return half_saturation
    # An input that is zero in all text has no trace.
    return half_saturation * max(1, round(float(moment.diagonal().double().mean())))


def projector_work_bytes(width: int) -> int:
    """The most bytes on its device while a projector is computed; afterwards there is only the projector.

    12 d^2 and a block of columns, 8 d^2 / 16. Either form first has a float64 matrix, 8 d^2, and a float32 one, 4 d^2:
    the moment as it arrives, then P (or the matrix whose eigenvectors are computed) as it grows by blocks. Then a
    low-rank form has eigenvectors in the place of the float32 matrix, and the work space of `syevd`, two more
    (1 + 6 d + 2 d^2 numbers in LAPACK).

    A saturation so small that rounding of M matters takes more: 24 d^2 for eigenvectors in float64, with rank `full`.

    Args:
        width: d.
    """
    return 12 * width**2 + 8 * width * _block_width(width)


def _scaled(
    moment: torch.Tensor, scale: float, device: torch.device | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """M / scale in float64, stored by columns: solvers work in such a matrix itself, and copy any other."""
    if out is None:
        out = torch.empty(moment.shape, dtype=torch.float64, device=device or moment.device).mT
    # Row by row of the memory, as M is symmetric. Sent in float32: a copy to another device and type would be converted
    # on the way, by twice as many bytes of host memory.
    out.mT.copy_(moment.to(out.device))
    return out.div_(scale)


def _factorize_(matrix: torch.Tensor) -> bool:
    """A <- L with A = L L^T, in the memory of A; whether A has one."""
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
    return not failed


def _inverse(factor: torch.Tensor, *, complement: bool = False) -> torch.Tensor:
    """(L L^T)^-1 in float32, symmetric; a block of its columns at a time, so that it takes no second float64 matrix.

    Args:
        factor: L, (d, d) float64, lower triangular.
        complement: I minus that instead, subtracted before it is rounded.
    """
    width = len(factor)
    inverse = torch.empty(width, width, device=factor.device)
    block = factor.new_empty(_block_width(width), width)
    for start in range(0, width, _block_width(width)):
        stop = min(start + _block_width(width), width)
        columns = block[: stop - start].zero_().mT
        columns[start:stop].fill_diagonal_(1.0)
        torch.linalg.solve_triangular(factor, columns, upper=False, out=columns)
        torch.linalg.solve_triangular(factor.mT, columns, upper=True, out=columns)
        if complement:
            columns.neg_()[start:stop].diagonal().add_(1.0)
        # Below the diagonal, and mirrored.
        inverse[start:, start:stop] = columns[start:]
        inverse[start:stop, stop:] = columns[stop:].mT
        inverse[start:stop, start:stop] = columns[start:stop].tril() + columns[start:stop].tril(-1).mT
    return inverse


def _block_width(width: int) -> int:
    return -(-width // NUM_BLOCKS)


def _decompose_(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(eigenvalues (d,) in ascending order, eigenvectors (d, d)) of A, in the memory of A."""
    eigenvalues = torch.empty(len(matrix), dtype=matrix.dtype, device=matrix.device)
    torch.linalg.eigh(matrix, out=(eigenvalues, matrix))
    return eigenvalues, matrix


@dataclass(frozen=True)
class Flattening:
    """The eigenvalues of M, in ascending order, that share one factor: those in [start, stop)."""

    start: int
    stop: int
    tail: float
    """tau = c / (c + mean of these eigenvalues); below their mean factor, because c / (c + a) is convex in a."""
    error: float
    """Largest difference of tau from the factor c / (c + a) of one of them."""


def build_projector(
    moment: torch.Tensor,
    half_saturation: float,
    rank: Rank,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> DenseProjector | LowRankProjector:
    """P = (I + M / c)^-1, exact or with the factor of most directions flattened to one, tau.

    The directions that share tau are a run of eigenvalues, the one of that length whose largest error is least. With a
    large c it is that of the smallest eigenvalues, and directions that earlier text uses keep their own factors; with
    a small c nearly all factors are close to 0, and it is rather the few open directions that keep theirs.

    Above r = d / 2 the exact form multiplies in fewer operations and is used.

    Args:
        moment: (d, d), M, on any device.
        half_saturation: c.
        rank: r of the directions that keep their factors; see `Rank`.
        dtype: of their basis, float32 or bfloat16.
        device: where P is computed and returned; None: where M is.

    Raises:
        ValueError: a rank below 1, or another dtype.
    """
    width = len(moment)
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"rank: found {rank}, expected 1 or more, full or auto")
    if is_dense(rank, width):
        return DenseProjector(direction_projector(moment, half_saturation, device))
    eigenvalues, vectors = decompose_moment(moment, half_saturation, device)
    ascending = eigenvalues.cpu()
    if rank == "auto":
        flat = smallest_flattening(ascending, half_saturation)
    else:
        assert isinstance(rank, int)
        flat = best_flattening(ascending, half_saturation, rank)
    if flat is None:
        del vectors
        return DenseProjector(direction_projector(moment, half_saturation, device))
    kept = torch.cat([torch.arange(flat.start), torch.arange(flat.stop, width)])
    factors = half_saturation / (half_saturation + ascending[kept])
    # The two ranges that are kept, rounded one after the other.
    basis = torch.cat([part.to(dtype) for part in (vectors[:, : flat.start], vectors[:, flat.stop :])], dim=1)
    return LowRankProjector.from_factors(basis, factors.to(vectors.device), flat.tail, dtype)


def decompose_moment(
    moment: torch.Tensor, half_saturation: float, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues a of M, and its eigenvectors in float32, accurate enough for the factors c / (c + a).

    A decomposition in float32 errs by eta, some 1e-6, of the largest eigenvalue. Of M that would be eta a_max / c in P:
    far too much where one direction has most of the energy. So the matrix that is decomposed is

        T = M (M + g I)^-1 = I - (I + M / g)^-1,    g = c (tr(M) / c)^(1/3), at least c,

    computed in float64: it has the eigenvectors of M and eigenvalues t = a / (a + g) below 1. An error e of T is an
    error of at most e g / c in P (in the spectral norm) and in the factors, and of e (a + g) / g, relative to a + g, in
    a. With tr(M) = k d over k domains, P errs by eta (k d / c)^(1/3). Measured on a CPU, eta is at most 1.4e-6 up to
    d = 1500 and does not grow faster than sqrt(d): P then errs by less than 5e-4 at d = 28,672, c = 0.2 and k = 1. The
    common factor tau depends on large a as well; it errs by less than 1e-6 where it was measured. For comparison: a
    basis in bfloat16 errs by 4e-3, and rank `auto` by up to a tenth.

    Args:
        moment: (d, d), M, on any device.
        half_saturation: c.
        device: where it is computed; None: where M is.

    Returns:
        (d,) float64 ascending from 0 on, and (d, d) float32 with a vector in each column.
    """
    total = float(moment.diagonal().double().sum())
    middle = half_saturation * max(total / half_saturation, 1.0) ** (1 / 3)
    matrix = _scaled(moment, middle, device)
    matrix.diagonal().add_(1.0)
    if not _factorize_(matrix):
        # c is below the rounding of M: nothing is negative beside its trace.
        middle = total
        _scaled(moment, middle, device, out=matrix).diagonal().add_(1.0)
        _factorize_(matrix)
    saturated = _inverse(matrix, complement=True)
    del matrix
    shares, vectors = _decompose_(saturated.mT)
    shares = shares.double().clamp_(0.0, 1.0 - 1e-9)
    return middle * shares / (1.0 - shares), vectors


def is_dense(rank: Rank, width: int) -> bool:
    """Whether a projector of this rank is exact for any moment: above d / 2 that takes fewer operations."""
    return rank == "full" or (isinstance(rank, int) and 2 * rank > width)


def best_flattening(ascending: torch.Tensor, half_saturation: float, rank: int) -> Flattening:
    """The run of d - r eigenvalues that one factor fits best.

    Args:
        ascending: (d,) float64, eigenvalues of M from 0 on.
        half_saturation: c.
        rank: r < d.
    """
    length = len(ascending) - rank
    # Of the runs that start at 0, 1 ... r.
    totals = torch.cat([ascending.new_zeros(1), ascending.cumsum(0)])
    means = (totals[length:] - totals[: rank + 1]) / length
    tails = half_saturation / (half_saturation + means)
    factors = half_saturation / (half_saturation + ascending)
    errors = torch.maximum(factors[: rank + 1] - tails, tails - factors[length - 1 :])
    start = int(errors.argmin())
    return Flattening(start, start + length, float(tails[start]), float(errors[start]))


def smallest_flattening(ascending: torch.Tensor, half_saturation: float) -> Flattening | None:
    """The best flattening of the smallest rank whose error is at most `MAX_FACTOR_ERROR`.

    Args:
        ascending: (d,) float64, eigenvalues of M from 0 on.
        half_saturation: c.

    Returns:
        None where the rank would be above d / 2.
    """
    # From 1 on, as ranks that are given are.
    for rank in range(1, len(ascending) // 2 + 1):
        flat = best_flattening(ascending, half_saturation, rank)
        if flat.error <= MAX_FACTOR_ERROR:
            return flat
    return None


def plasticity(projector: Projector) -> float:
    """tr(P) / d: the share of a gradient without preferred directions that passes; 1 where nothing is masked."""
    return projector.trace / projector.width


def passing_energy(projector: Projector, moment: torch.Tensor, block_size: int | None = None) -> float:
    """tr(P A P) / tr(A) = E|x P|^2 / E|x|^2: the share of an input's energy that passes; 1 for an input of zeros.

    Of earlier text an update can still disturb as much, of the next domain's it can use as much.

    Args:
        projector: P, on the device of A.
        moment: (d, d), A = E[x x^T], up to a factor.
        block_size: b, rows of A and P that are multiplied at once; None: few enough that with them, P and A take less
            than `projector_work_bytes`.
    """
    block_size = block_size or _block_width(len(moment))
    energy = moment.diagonal().double().sum()
    passing = torch.zeros_like(energy)
    for start, rows in zip(range(0, len(moment), block_size), moment.float().split(block_size), strict=True):
        unit_vectors = torch.zeros_like(rows)
        unit_vectors.diagonal(start).fill_(1.0)
        # tr(P A P) = sum over entries of (A P) times P, as P is symmetric.
        passing += (projector.project(rows) * projector.project(unit_vectors)).sum(dtype=torch.float64)
    return float(torch.where(energy == 0, 1.0, passing / energy))
