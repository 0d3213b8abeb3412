"""What a matrix of held-out losses says about forgetting and transfer.

R (t + 1, E): row 0 before training, row r after domain r; column i < T belongs to domain i + 1, column g to the
general corpus, where there is one. With t < T the run still goes on, and everything refers to its last row so far.
Losses are in nats, lower is better; each sign is chosen so that the name tells what a positive number means.
"""

from __future__ import annotations

import torch


def forgetting(loss_matrix: torch.Tensor, num_domains: int) -> torch.Tensor:
    """Loss now minus loss right after learning, for every domain before the last one learned.

    F_i = R[t, i] - R[i + 1, i],  i = 0 .. t - 2

    The last domain has had no chance to be forgotten and does not count.

    Args:
        loss_matrix: R (t + 1, E), floating point.
        num_domains: T.

    Returns:
        (max(t - 1, 0),); positive means forgotten.
    """
    num_earlier = max(_num_learned(loss_matrix, num_domains) - 1, 0)
    return loss_matrix[-1, :num_earlier] - _right_after_learning(loss_matrix, num_earlier)


def backward_transfer(loss_matrix: torch.Tensor, num_domains: int) -> float:
    """What later domains did for earlier ones: minus the average forgetting.

    BWT = mean_i (R[i + 1, i] - R[t, i]),  i = 0 .. t - 2

    Positive means that earlier domains got better; 0 while fewer than two domains are learned. This is BWT of
    Lopez-Paz & Ranzato (GEM, NeurIPS 2017) with the sign turned, as they measure accuracy and this is a loss.
    """
    return _mean(-forgetting(loss_matrix, num_domains))


def forward_transfer(loss_matrix: torch.Tensor, num_domains: int) -> float:
    """What earlier domains did for a domain before it was learned itself.

    FWT = mean_i (R[0, i] - R[i, i]),  i = 1 .. min(t, T - 1)

    Positive means that earlier domains helped; 0 where no domain has one before it. FWT of GEM with the sign turned
    and the untrained row in the place of its random baseline.
    """
    last = min(_num_learned(loss_matrix, num_domains), num_domains - 1)
    just_before = loss_matrix.diagonal()[1 : last + 1]
    return _mean(loss_matrix[0, 1 : last + 1] - just_before)


def general_drift(loss_matrix: torch.Tensor, num_domains: int) -> torch.Tensor:
    """Loss now minus loss before training, for every column that is no domain.

    D_g = R[t, g] - R[0, g],  g = T .. E - 1

    Returns:
        (E - T,); positive means that general language got worse.
    """
    _num_learned(loss_matrix, num_domains)
    return (loss_matrix[-1] - loss_matrix[0])[num_domains:]


def _right_after_learning(loss_matrix: torch.Tensor, num_domains: int) -> torch.Tensor:
    return loss_matrix[1:].diagonal()[:num_domains]


def _num_learned(loss_matrix: torch.Tensor, num_domains: int) -> int:
    """t, after checking the shape of R."""
    num_rows, num_columns = loss_matrix.shape
    assert 1 <= num_rows <= num_domains + 1, f"{num_rows} rows for {num_domains} domains"
    assert num_columns >= num_domains, f"{num_columns} columns for {num_domains} domains"
    return num_rows - 1


def _mean(values: torch.Tensor) -> float:
    return values.mean().item() if values.numel() else 0.0
