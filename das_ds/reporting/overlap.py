"""Overlap of importance: which units several sources (general knowledge, domains) claim together.

Shape legend: D sources, N units or weights.
"""

from __future__ import annotations

import torch


class Overlap:
    """Accumulates sums over chunks of importance, from which the overlap over all units follows.

    Args:
        num_sources: D.
        threshold: a source claims units of at least this importance.
    """

    def __init__(self, num_sources: int, threshold: float) -> None:
        self._threshold = threshold
        self._num_both = torch.zeros(num_sources, num_sources, dtype=torch.float64)
        self._products = torch.zeros(num_sources, num_sources, dtype=torch.float64)
        self._num_units = 0

    def add(self, importance_DN: torch.Tensor) -> None:
        """Add a chunk of units.

        Args:
            importance_DN: (D, N) float32 in [0, 1], the same units for every source.
        """
        claims_DN = (importance_DN >= self._threshold).double()
        self._num_both += claims_DN @ claims_DN.T
        self._products += importance_DN.double() @ importance_DN.double().T
        self._num_units += importance_DN.shape[1]

    def unit_shares(self) -> torch.Tensor:
        """Fraction of all units that each source claims, (D,) float64."""
        return self._num_both.diagonal() / max(self._num_units, 1)

    def jaccard(self) -> torch.Tensor:
        """Units claimed by both sources over units claimed by either, (D, D) float64; 0 if neither claims any.

        J_ab = |A and B| / |A or B|  (Jaccard 1912)
        """
        sizes = self._num_both.diagonal()
        num_either = sizes[:, None] + sizes[None, :] - self._num_both
        return self._num_both / num_either.clamp_min(1.0)

    def cosine(self) -> torch.Tensor:
        """Cosine between the importance of two sources, (D, D) float64; 0 if either is all zero."""
        norms = self._products.diagonal().sqrt()
        return self._products / (norms[:, None] * norms[None, :]).clamp_min(torch.finfo(torch.float64).tiny)


def expected_jaccard(share: float, other_share: float) -> float:
    """Jaccard index expected of two sources that claim units independently: pq / (p + q - pq).

    Args:
        share: p, the fraction of units that one source claims.
        other_share: q.
    """
    both = share * other_share
    return both / (share + other_share - both) if both else 0.0
