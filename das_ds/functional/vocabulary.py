"""Rows of tokens that a vocabulary gains.

Shape legend: E rows of a parameter with one row per token, C columns.
"""

from __future__ import annotations

import torch


def with_mean_rows(weight: torch.Tensor, known: int, total: int) -> torch.Tensor:
    """A copy in which rows [known, total) are the mean of rows [0, known), taken in float64.

    Args:
        weight: (E, C), or (E,) for a bias.
        known: tokens that have been learned.
        total: tokens there will be; at most E.
    """
    filled = weight.clone()
    filled[known:total] = weight[:known].mean(dim=0, dtype=torch.float64).to(weight.dtype)
    return filled
