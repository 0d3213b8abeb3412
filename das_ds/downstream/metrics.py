"""Scores of a classifier, all taken from its confusion matrix.

Shape legend: N rows, C classes; counts_CC[a, p] is the number of rows of class a that were predicted as p.
"""

from __future__ import annotations

import torch


def confusion_matrix(actual: torch.Tensor, predicted: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Counts (C, C) of actual against predicted classes.

    Args:
        actual: (N,) int64 in [0, C).
        predicted: (N,) int64 in [0, C).
        num_classes: C.
    """
    return torch.bincount(actual * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


def accuracy(counts_CC: torch.Tensor) -> float:
    """Share of rows that are predicted rightly."""
    counts = counts_CC.to(torch.float64)
    return (counts.diagonal().sum() / counts.sum()).item()


def macro_f1(counts_CC: torch.Tensor) -> float:
    """Mean F1 over the classes that some row has or is predicted as, each class counting once.

    F1_c = 2 TP_c / (2 TP_c + FP_c + FN_c)
    """
    hits, claims = _hits_and_claims(counts_CC)
    there = claims > 0
    return (2 * hits[there] / claims[there]).mean().item()


def micro_f1(counts_CC: torch.Tensor) -> float:
    """F1 of the counts of all classes together, which is the accuracy where every row has one label."""
    hits, claims = _hits_and_claims(counts_CC)
    return (2 * hits.sum() / claims.sum()).item()


def _hits_and_claims(counts_CC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """TP and 2 TP + FP + FN of every class, (C,) float64."""
    counts = counts_CC.to(torch.float64)
    return counts.diagonal(), counts.sum(dim=0) + counts.sum(dim=1)
