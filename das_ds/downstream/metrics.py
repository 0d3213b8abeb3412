"""Metrics of a classifier, computed from its confusion matrix; equal to those of scikit-learn.

Shape legend: N rows, C classes; counts_CC[a, p] is the number of rows of class a that were predicted as p.
"""

from __future__ import annotations

import torch


def confusion_matrix(actual: torch.Tensor, predicted: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Counts (C, C) of actual by predicted classes.

    Args:
        actual: (N,) int64 in [0, C).
        predicted: (N,) int64 in [0, C).
        num_classes: C.
    """
    return torch.bincount(actual * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


def accuracy(counts_CC: torch.Tensor) -> float:
    """Fraction of correctly predicted rows."""
    counts = counts_CC.to(torch.float64)
    return (counts.diagonal().sum() / counts.sum()).item()


def macro_f1(counts_CC: torch.Tensor) -> float:
    """Unweighted mean of F1_c over the classes that occur as actual or predicted class.

    F1_c = 2 TP_c / (2 TP_c + FP_c + FN_c)
    """
    true_positives, denominators = _f1_terms(counts_CC)
    occurs = denominators > 0
    return (2 * true_positives[occurs] / denominators[occurs]).mean().item()


def micro_f1(counts_CC: torch.Tensor) -> float:
    """F1 of the summed counts, 2 sum_c TP_c / sum_c (2 TP_c + FP_c + FN_c); the accuracy if every row has one label."""
    true_positives, denominators = _f1_terms(counts_CC)
    return (2 * true_positives.sum() / denominators.sum()).item()


def _f1_terms(counts_CC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """TP and 2 TP + FP + FN of every class, (C,) float64."""
    counts = counts_CC.to(torch.float64)
    return counts.diagonal(), counts.sum(dim=0) + counts.sum(dim=1)
