"""What a matrix of held-out losses, or of scores on end tasks, says about forgetting and transfer.

R (t + 1, C): row 0 before training, row r after stage r, and a column for every corpus or task; NaN where nothing was
measured. With stages still to come, everything refers to the last row so far. `learned` (C,) has for every column the
row l_i right after the stage that learned its domain, which may not be there yet, and 0 for a column of no domain, such
as general text.

Each function gives one number per column: NaN where the column does not count (its mask tells which do), or where a
number that it needs was not measured. Lower is better for losses, higher for scores; s = 1 for losses and -1 for scores
makes every sign tell the same about both.
"""

from __future__ import annotations

import math

import torch


def has_forgetting(matrix: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    """Columns whose domain was learned before the last stage, 0 < l_i < t; (C,) bool.

    What the last stage learned has had no chance to be forgotten.
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
        higher_is_better: R holds scores.

    Returns:
        (C,); positive means forgotten.
    """
    rise = matrix[-1] - _at(matrix, learned)
    return _signed(rise, higher_is_better).where(has_forgetting(matrix, learned), math.nan)


def has_forward_transfer(matrix: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    """Columns whose domain has a stage before it, with the row right before learning it there, 1 < l_i <= t + 1."""
    return (learned > 1) & (learned <= _last_row(matrix, learned) + 1)


def forward_transfer(matrix: torch.Tensor, learned: torch.Tensor, *, higher_is_better: bool = False) -> torch.Tensor:
    """What earlier stages did for a column before its own domain was learned.

    FWT_i = s (R[0, i] - R[l_i - 1, i])  where 1 < l_i <= t + 1

    FWT of GEM with the untrained row in the place of its random baseline.

    Args:
        matrix, learned, higher_is_better: as for `forgetting`.

    Returns:
        (C,); positive means helped.
    """
    fall = matrix[0] - _at(matrix, learned - 1)
    return _signed(fall, higher_is_better).where(has_forward_transfer(matrix, learned), math.nan)


def drift(matrix: torch.Tensor, learned: torch.Tensor, *, higher_is_better: bool = False) -> torch.Tensor:
    """What became of columns that belong to no domain.

    D_i = s (R[t, i] - R[0, i])  where l_i = 0

    Args:
        matrix, learned, higher_is_better: as for `forgetting`.

    Returns:
        (C,); positive means worse.
    """
    return _signed(matrix[-1] - matrix[0], higher_is_better).where(learned == 0, math.nan)


def average(values: torch.Tensor, learned: torch.Tensor, counted: torch.Tensor) -> float | None:
    """Mean over stages of the mean over the columns of each, so that a domain with many tasks counts once.

    Args:
        values: (C,), one number per column.
        learned: (C,) int64.
        counted: (C,) bool.

    Returns:
        None where no column counts, or a value of one that does was not measured.
    """
    means = [values[counted & (learned == row)].mean() for row in learned[counted].unique()]
    mean = torch.stack(means).mean().item() if means else math.nan
    return None if math.isnan(mean) else mean


def _signed(values: torch.Tensor, higher_is_better: bool) -> torch.Tensor:
    return -values if higher_is_better else values


def _at(matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """R[rows_i, i], of any row there is where rows_i is none of the matrix."""
    return matrix.gather(0, rows.clamp(0, len(matrix) - 1)[None])[0]


def _last_row(matrix: torch.Tensor, learned: torch.Tensor) -> int:
    """t, after checking shapes."""
    assert matrix.ndim == 2 and len(matrix) >= 1, f"a matrix of shape {tuple(matrix.shape)}"
    assert learned.shape == matrix.shape[1:], f"{tuple(learned.shape)} for {matrix.shape[1]} columns"
    return len(matrix) - 1
