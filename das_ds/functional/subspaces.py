"""Orthogonal subspaces of a weight matrix: its leading singular directions, and the projection that leaves them fixed.

Orthogonal subspace fine-tuning (OSFT; Nayak et al., "Sculpting Subspaces", ICLR 2026, arXiv 2504.07097) in weight
space. For W = U S V^T, its k leading left and right singular vectors U_k and V_k are frozen:

    dW <- (I - U_k U_k^T) dW (I - V_k V_k^T)

so that U_k^T W, W V_k and with them U_k S_k V_k^T stay as they are.

Shape legend: o, d rows and columns of a matrix as it is stored, m = min(o, d) its singular values, k frozen directions,
n matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from das_ds.functional.projectors import LowRankProjector


@dataclass(frozen=True)
class TwoSidedProjector:
    """dW -> L dW R of a matrix (o, d), which is given as one vector of o d elements.

    Args:
        left: L, of the columns of the matrix.
        right: R, of its rows.
    """

    left: LowRankProjector
    right: LowRankProjector

    @property
    def width(self) -> int:
        """o d."""
        return self.left.width * self.right.width

    @property
    def num_bytes(self) -> int:
        """Of both sides."""
        return self.left.num_bytes + self.right.num_bytes

    def project(self, vectors: torch.Tensor) -> torch.Tensor:
        """L dW R, computed in float32: (n, o d) -> (n, o d) in the dtype of the vectors."""
        num_rows = self.left.width
        num_columns = self.right.width
        product = self.right.project(vectors.float().reshape(-1, num_columns))
        columns = product.view(-1, num_rows, num_columns).transpose(1, 2).reshape(-1, num_rows)
        product = self.left.project(columns)
        rows = product.view(-1, num_columns, num_rows).transpose(1, 2)
        return rows.reshape(len(vectors), -1).to(vectors.dtype)


def num_frozen_directions(num_rows: int, num_columns: int, unfreeze_rank_ratio: float) -> int:
    """k = floor((1 - r) m), at most m - 1, as mini_trainer 0.9.0 rounds it (`auto_generate_target_osft_config`).

    Args:
        num_rows: o.
        num_columns: d.
        unfreeze_rank_ratio: r in [0, 1].
    """
    num_directions = min(num_rows, num_columns)
    return min(int(num_directions * (1.0 - unfreeze_rank_ratio)), num_directions - 1)


def stored_rank(size: int, num_directions: int, num_frozen: int) -> int:
    """Vectors that one side's projector is stored with: the frozen ones, or the others where these are fewer.

    Args:
        size: o for the left side, d for the right one.
        num_directions: m.
        num_frozen: k.
    """
    # Only where singular vectors are a complete basis, those that are not frozen span all that is free.
    return min(num_frozen, size - num_frozen) if size == num_directions else num_frozen


def freeze_leading_directions(matrix: torch.Tensor, num_frozen: int) -> TwoSidedProjector:
    """The projection I - U_k U_k^T, I - V_k V_k^T of a matrix, by its singular value decomposition in float32.

    Args:
        matrix: W, (o, d) float32.
        num_frozen: k.
    """
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return TwoSidedProjector(_project_out(left, num_frozen), _project_out(right.T, num_frozen))


def _project_out(vectors: torch.Tensor, num_frozen: int) -> LowRankProjector:
    """I - V_k V_k^T for the first k of orthonormal columns (size, m)."""
    size, num_directions = vectors.shape
    if stored_rank(size, num_directions, num_frozen) < num_frozen:
        free = vectors[:, num_frozen:]
        return LowRankProjector.from_factors(free, torch.ones_like(free[0]), tail=0.0)
    frozen = vectors[:, :num_frozen]
    return LowRankProjector.from_factors(frozen, torch.zeros_like(frozen[0]), tail=1.0)
