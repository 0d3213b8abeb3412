"""Metrics of a classifier and early stopping, compared with values computed by hand."""

from __future__ import annotations

import pytest
import torch

from das_ds.downstream.finetune import EarlyStopping
from das_ds.downstream.metrics import accuracy, confusion_matrix, macro_f1, micro_f1

# Ten rows of three classes: six are right.
ACTUAL = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
PREDICTED = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 0, 0])


def test_confusion_matrix_rows_are_actual_classes() -> None:
    assert confusion_matrix(ACTUAL, PREDICTED, 3).tolist() == [[3, 1, 0], [0, 2, 1], [2, 0, 1]]


def test_metrics_equal_hand_computed() -> None:
    counts = confusion_matrix(ACTUAL, PREDICTED, 3)
    assert accuracy(counts) == pytest.approx(0.6)
    # Precision and recall: 3/5 and 3/4, 2/3 and 2/3, 1/2 and 1/3.
    assert macro_f1(counts) == pytest.approx((2 / 3 + 2 / 3 + 2 / 5) / 3)
    assert micro_f1(counts) == pytest.approx(0.6)


def test_macro_f1_weighs_classes_equally() -> None:
    counts = confusion_matrix(torch.tensor([0] * 9 + [1]), torch.zeros(10, dtype=torch.int64), 2)
    assert accuracy(counts) == pytest.approx(0.9)
    assert macro_f1(counts) == pytest.approx((18 / 19 + 0.0) / 2)


def test_macro_f1_skips_absent_classes() -> None:
    assert macro_f1(confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 1]), 4)) == 1.0
    # Class 0 is right; 1 is missed and 2 only predicted, both F1 0; 3 is nowhere.
    assert macro_f1(confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 2]), 4)) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("scores", "patience", "best", "epochs"),
    [
        ([0.1, 0.5, 0.4, 0.6, 0.6, 0.2, 0.9], 2, 4, 6),
        ([0.5, 0.4, 0.9], 1, 1, 2),
        ([0.0, 0.0, 0.0], 3, 1, 3),
        ([0.1, 0.2, 0.3], 1, 3, 3),
    ],
)
def test_early_stopping_first_best_until_patience(scores: list[float], patience: int, best: int, epochs: int) -> None:
    stopping = EarlyStopping(patience)
    assert not stopping.is_over
    for score in scores:
        stopping.update(score)
        if stopping.is_over:
            break
    assert (stopping.best_epoch, stopping.epochs) == (best, epochs)
