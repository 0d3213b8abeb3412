"""Forgetting and transfer, computed from a matrix of held-out losses or of end-task scores.

R (t + 1, C): row 0 before training, row r after stage r, one column per corpus or task; NaN where not measured. While
stages remain, everything refers to the last row so far. `learned` (C,) gives for every column the row l_i right after
the stage that learned its domain (which may not exist yet), or 0 for a column of no domain, such as general text.

Each function returns one value per column: NaN where the column does not count (its `has_` mask tells), or where a
value that it needs was not measured. Losses are better when lower, scores when higher; the factor s, 1 for losses and
-1 for scores, gives every sign the same meaning for both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def to_matrix(rows: Sequence[Sequence[float | None]]) -> torch.Tensor:
    """R as float64, from rows in which None is not measured."""
    return torch.tensor([[math.nan if value is None else value for value in row] for row in rows], dtype=torch.float64)


def has_forgetting(matrix: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    """Columns whose domain was learned before the last stage, 0 < l_i < t; (C,) bool.

    Nothing can have made the model forget the last stage yet.
    """
    return (learned > 0) & (learned < _last_row(matrix, learned))


def forgetting(matrix: torch.Tensor, learned: torch.Tensor, *, higher_is_better: bool = False) -> torch.Tensor:
    """How much worse a column is now than right after learning.

    F_i = s (R[t, i] - R[l_i, i])  where 0 < l_i < t

    For scores this is the forgetting rate of DAS (Ke et al., ICLR 2023, section 4), A_kk - A_tk before the mean over k.
    Backward transfer of GEM (Lopez-Paz & Ranzato, NeurIPS 2017) is minus its mean.

    Args:
        matrix: R (t + 1, C), floating point.
        learned: (C,) int64.
        higher_is_better: whether R contains scores.

    Returns:
        (C,); positive means forgotten.
    """
    rise = matrix[-1] - _gather_rows(matrix, learned)
    return _signed(rise, higher_is_better).where(has_forgetting(matrix, learned), math.nan)


def has_forward_transfer(matrix: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    """Columns with a stage before the one that learned their domain, 1 < l_i <= t + 1; (C,) bool."""
    return (learned > 1) & (learned <= _last_row(matrix, learned) + 1)


def forward_transfer(matrix: torch.Tensor, learned: torch.Tensor, *, higher_is_better: bool = False) -> torch.Tensor:
    """How much earlier stages improved a column before its own domain was learned.

    FWT_i = s (R[0, i] - R[l_i - 1, i])  where 1 < l_i <= t + 1

    FWT of GEM (Lopez-Paz & Ranzato, NeurIPS 2017), with the row before training as its random baseline.

    Args:
        matrix, learned, higher_is_better: as for `forgetting`.

    Returns:
        (C,); positive means improved.
    """
    fall = matrix[0] - _gather_rows(matrix, learned - 1)
    return _signed(fall, higher_is_better).where(has_forward_transfer(matrix, learned), math.nan)


def drift(matrix: torch.Tensor, learned: torch.Tensor, *, higher_is_better: bool = False) -> torch.Tensor:
    """Change since before training of columns that belong to no domain.

    D_i = s (R[t, i] - R[0, i])  where l_i = 0

    Args:
        matrix, learned, higher_is_better: as for `forgetting`.

    Returns:
        (C,); positive means worse.
    """
    return _signed(matrix[-1] - matrix[0], higher_is_better).where(learned == 0, math.nan)


def average(values: torch.Tensor, learned: torch.Tensor, counted: torch.Tensor) -> float | None:
    """Mean over stages of the mean over each stage's columns, so that a domain with many tasks counts once.

    Args:
        values: (C,), one per column.
        learned: (C,) int64.
        counted: (C,) bool.

    Returns:
        None if no column counts, or if a column that counts was not measured.
    """
    means = [values[counted & (learned == row)].mean() for row in learned[counted].unique()]
    mean = torch.stack(means).mean().item() if means else math.nan
    return None if math.isnan(mean) else mean


def _signed(values: torch.Tensor, higher_is_better: bool) -> torch.Tensor:
    return -values if higher_is_better else values


def _gather_rows(matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """R[rows_i, i], (C,); a row outside the matrix is clamped into it, since its column is masked later."""
    return matrix.gather(0, rows.clamp(0, len(matrix) - 1)[None])[0]


def _last_row(matrix: torch.Tensor, learned: torch.Tensor) -> int:
    """t, after checking shapes."""
    assert matrix.ndim == 2 and len(matrix) >= 1, f"a matrix of shape {tuple(matrix.shape)}"
    assert learned.shape == matrix.shape[1:], f"{tuple(learned.shape)} for {matrix.shape[1]} columns"
    return len(matrix) - 1
