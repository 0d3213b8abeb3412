"""Projectors of directions: the matrix P (d, d) that every vector of a gradient or an update is multiplied by.

Shape legend: n vectors, d elements of a vector, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class VectorMap(Protocol):
    """What a mask needs of a projector: the product with complete vectors."""

    @property
    def width(self) -> int:
        """d."""

    def project(self, vectors: torch.Tensor) -> torch.Tensor:
        """x P of complete vectors x, (n, d) -> (n, d) in the dtype of the vectors."""


class Projector(VectorMap, Protocol):
    """A symmetric matrix P (d, d) with eigenvalues in [0, 1]."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it occupies."""

    @property
    def trace(self) -> float:
        """tr(P); waits for the device."""


@dataclass(frozen=True)
class DenseProjector:
    """P as it is.

    Args:
        matrix: P, (d, d) float32.
    """

    matrix: torch.Tensor

    @property
    def width(self) -> int:
        """d."""
        return len(self.matrix)

    @property
    def num_bytes(self) -> int:
        """4 d^2."""
        return self.matrix.nbytes

    @property
    def trace(self) -> float:
        """tr(P)."""
        return float(self.matrix.diagonal().double().sum())

    def project(self, vectors: torch.Tensor) -> torch.Tensor:
        """x P."""
        return (vectors.float() @ self.matrix).to(vectors.dtype)


@dataclass(frozen=True)
class ExactMap:
    """Any matrix R, whose products are made in float64, also where the device multiplies float32 with fewer digits.

    Args:
        matrix: R, (d, d) float64.
    """

    matrix: torch.Tensor

    @property
    def width(self) -> int:
        """d."""
        return len(self.matrix)

    def project(self, vectors: torch.Tensor) -> torch.Tensor:
        """x R."""
        return (vectors.double() @ self.matrix).to(vectors.dtype)


@dataclass(frozen=True)
class LowRankProjector:
    """P = tau I + V diag(g) V^T: r directions with a factor of their own, tau for all others.

    4 n d r operations for n vectors instead of 2 n d^2.

    Error: with V in bfloat16, P as a matrix is off by up to 2^-8 max |g|, in the spectral norm. Float32 vectors are
    multiplied in float32 (TF32 where the caller allows it), bfloat16 vectors on a GPU in bfloat16 with float32 sums,
    where the rounding of x V adds 2^-9 |x| max |g|, as much as the rounding of the vector had cost.

    Args:
        basis: V, (d, r), float32 or bfloat16, with orthogonal columns.
        gains: g, (r,) float32; s - tau for a column of length 1 whose factor is s.
        tail: tau.
    """

    basis: torch.Tensor
    gains: torch.Tensor
    tail: float

    @classmethod
    def from_factors(
        cls, vectors: torch.Tensor, factors: torch.Tensor, tail: float, dtype: torch.dtype = torch.float32
    ) -> LowRankProjector:
        """The projector with factor s for each vector, and tau for whatever is orthogonal to all of them.

        Args:
            vectors: (d, r), orthonormal columns.
            factors: s, (r,).
            tail: tau.
            dtype: of V, float32 or bfloat16.

        Raises:
            ValueError: another dtype.
        """
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"dtype: found {dtype}, expected torch.float32 or torch.bfloat16 (products overflow float16)"
            )
        basis = vectors.to(dtype).contiguous()
        # Rounding changes a column's length, which would add to the smallest factors as much as they are.
        lengths = torch.stack(
            [torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64) for rows in basis.split(1024)]
        )
        lengths = lengths.square().sum(dim=0)
        return cls(basis, ((factors.double() - tail) / lengths).float(), tail)

    @property
    def width(self) -> int:
        """d."""
        return self.basis.shape[0]

    @property
    def num_bytes(self) -> int:
        """2 d r or 4 d r, and 4 r."""
        return self.basis.nbytes + self.gains.nbytes

    @property
    def trace(self) -> float:
        """tr(P) = d tau + sum_i g_i |v_i|^2."""
        lengths = self.basis.float().square().sum(dim=0)
        return self.width * self.tail + float((self.gains * lengths).double().sum())

    def project(self, vectors: torch.Tensor) -> torch.Tensor:
        """x P = tau x + ((x V) g) V^T."""
        weighted = multiply(vectors, self.basis) * self.gains
        if runs_in_16_bits(vectors, self.basis):
            weighted = weighted.bfloat16()
        return multiply(weighted, self.basis.T).add_(vectors, alpha=self.tail).to(vectors.dtype)


def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left right, summed in float32: in bfloat16 where both are and the device can, else in float32.

    A factor that is not in float32 is copied for the product where the device cannot multiply it as it is.

    Args:
        left: (n, a).
        right: (a, b).

    Returns:
        (n, b) float32.
    """
    if runs_in_16_bits(left, right):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def runs_in_16_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether `multiply` reads these factors as they are: only products on GPUs return float32 for 16-bit factors."""
    return left.is_cuda and left.dtype == right.dtype == torch.bfloat16
