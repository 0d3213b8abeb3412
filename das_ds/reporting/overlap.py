"""Which units several sources (general knowledge, domains) claim together.

Shape legend: D sources, N units or weights.
"""

from __future__ import annotations

import torch


class Overlap:
    """Sums over stretches of importance, from which the overlap of the whole follows.

    Args:
        num_sources: D.
        threshold: a source claims a unit whose importance is at least this.
    """

    def __init__(self, num_sources: int, threshold: float) -> None:
        self._threshold = threshold
        self._both = torch.zeros(num_sources, num_sources, dtype=torch.float64)
        self._products = torch.zeros(num_sources, num_sources, dtype=torch.float64)
        self._count = 0

    def add(self, importance_DN: torch.Tensor) -> None:
        """Count a stretch.

        Args:
            importance_DN: (D, N) float32 in [0, 1], the same units for every source.
        """
        claims_DN = (importance_DN >= self._threshold).double()
        self._both += claims_DN @ claims_DN.T
        self._products += importance_DN.double() @ importance_DN.double().T
        self._count += importance_DN.shape[1]

    def shares(self) -> torch.Tensor:
        """Share of all units that each source claims, (D,) float64."""
        return self._both.diagonal() / max(self._count, 1)

    def jaccard(self) -> torch.Tensor:
        """Units that both claim by units that one of them claims, (D, D) float64; 0 where nobody claims any.

        J_ab = |A and B| / |A or B|  (Jaccard 1912)
        """
        sizes = self._both.diagonal()
        either = sizes[:, None] + sizes[None, :] - self._both
        return self._both / either.clamp_min(1.0)

    def cosine(self) -> torch.Tensor:
        """Cosine of the importance of two sources, (D, D) float64; 0 where one of them is 0 throughout."""
        norms = self._products.diagonal().sqrt()
        return self._products / (norms[:, None] * norms[None, :]).clamp_min(torch.finfo(torch.float64).tiny)


def expected_jaccard(share: float, other: float) -> float:
    """What two sources that choose independently would come to: pq / (p + q - pq)."""
    both = share * other
    return both / (share + other - both) if both else 0.0
