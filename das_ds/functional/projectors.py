"""Projectors of directions: the matrix P (d, d) that every vector of a gradient or an update is multiplied by.

A projector multiplies complete vectors, and vectors of which each rank has a fragment. For these a rank encodes its
fragment, codes are summed over the ranks that share the vector, and the sum is decoded into the rank's own elements.

Shape legend: n vectors, d elements of a vector, m elements of a fragment of it, k elements of a code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class Projector(Protocol):
    """A symmetric matrix P (d, d) with eigenvalues in [0, 1]."""

    @property
    def width(self) -> int:
        """d."""

    @property
    def code_width(self) -> int:
        """k."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it occupies."""

    def project(self, vectors: torch.Tensor) -> torch.Tensor:
        """x P of complete vectors x, (n, d) -> (n, d) in the dtype of the vectors."""

    def encode(self, fragments: torch.Tensor, columns: slice) -> torch.Tensor:
        """Code of the fragments (n, m) of vectors at these columns, (n, k) float32; linear in the fragment."""

    def decode(self, codes: torch.Tensor, fragments: torch.Tensor, columns: slice) -> torch.Tensor:
        """The columns of x P, (n, m) in the dtype of the fragments, from the sum of the codes of all fragments of x.

        Args:
            codes: (n, k) float32.
            fragments: (n, m), x at these columns.
            columns: of the m elements among the d.
        """


@dataclass(frozen=True)
class DenseProjector:
    """P as it is; the code of a vector is the vector.

    Args:
        matrix: P, (d, d) float32.
    """

    matrix: torch.Tensor

    @property
    def width(self) -> int:
        """d."""
        return len(self.matrix)

    @property
    def code_width(self) -> int:
        """d."""
        return len(self.matrix)

    @property
    def num_bytes(self) -> int:
        """4 d^2."""
        return self.matrix.nbytes

    def project(self, vectors: torch.Tensor) -> torch.Tensor:
        """x P."""
        return (vectors.float() @ self.matrix).to(vectors.dtype)

    def encode(self, fragments: torch.Tensor, columns: slice) -> torch.Tensor:
        """The fragment at its place among zeros."""
        codes = fragments.new_zeros(len(fragments), self.width, dtype=torch.float32)
        codes[:, columns] = fragments.float()
        return codes

    def decode(self, codes: torch.Tensor, fragments: torch.Tensor, columns: slice) -> torch.Tensor:
        """Complete vectors times the columns of P."""
        return (codes @ self.matrix[:, columns]).to(fragments.dtype)
