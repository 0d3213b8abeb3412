"""Losses against hand-computed cases, loops and torch's own definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from das_ds.functional.losses import (
    contrastive_loss,
    distillation_loss,
    representation_kl,
    sequence_token_loss,
    softmax_kl,
    top_k_entropy,
)


def test_contrastive_loss_two_by_two_by_hand() -> None:
    # Unit vectors at 0 and 90 degrees; positives equal their anchors; prev_1 equals anchor 1, prev_2 its opposite.
    full = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    previous = torch.tensor([[2.0, 0.0], [-1.0, 0.0]])
    temperature = 0.5
    # Similarities / T: anchor 1 -> full+ (2, 0), prev (2, -2); anchor 2 -> full+ (0, 2), prev (0, 0).
    first = math.log(math.exp(2) + 1 + math.exp(2) + math.exp(-2)) - 2
    second = math.log(1 + math.exp(2) + 1 + 1) - 2
    loss = contrastive_loss(full, 3 * full, previous, first_positive=0, temperature=temperature)
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)


def test_contrastive_loss_pairs_anchor_with_positive() -> None:
    anchors = torch.randn(2, 5)
    positives = torch.randn(6, 5)
    previous = torch.randn(6, 5)
    total = 0.0
    for n in range(2):
        similarity = torch.stack(
            [functional.cosine_similarity(anchors[n], row, dim=0) for row in (*positives, *previous)]
        )
        total += -(similarity / 0.1).log_softmax(0)[4 + n].item()
    found = contrastive_loss(anchors, positives, previous, first_positive=4, temperature=0.1)
    assert found.item() == pytest.approx(total / 2, rel=1e-5)


def test_contrastive_loss_equal_and_zero_rows_finite() -> None:
    rows = torch.zeros(3, 4, requires_grad=True)
    loss = contrastive_loss(rows, rows, rows, first_positive=0, temperature=0.05)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(6))
    assert rows.grad is not None and rows.grad.isfinite().all()


def test_representation_kl_equals_torch() -> None:
    first = torch.randn(3, 4, 7)
    second = torch.randn(3, 4, 7)
    expected = functional.kl_div(second.log_softmax(-1), first.log_softmax(-1), log_target=True, reduction="none")
    torch.testing.assert_close(representation_kl(first, second), expected.sum(-1).mean(1))
    assert representation_kl(first, first).abs().max() == 0


def test_distillation_loss_by_hand() -> None:
    """Two of two numbers: the teacher's softmax at T = 2 is (3/4, 1/4), the student's (1/2, 1/2)."""
    teacher = torch.tensor([[[2 * math.log(3), 0.0]]])
    student = torch.tensor([[[5.0, 5.0]]])
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert distillation_loss(teacher, student, temperature=2.0).item() == pytest.approx(4 * kl, rel=1e-6)
    rows = torch.cat((teacher, student))
    equal = torch.cat((student, student))
    assert distillation_loss(rows, equal, temperature=2.0).item() == pytest.approx(2 * kl, rel=1e-6)


def test_softmax_kl_by_hand() -> None:
    first = torch.tensor([[2 * math.log(3), 0.0], [1.0, 1.0]], dtype=torch.float64)
    second = torch.tensor([[0.0, 0.0], [7.0, 7.0]], dtype=torch.float64)
    expected = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert softmax_kl(first, second).tolist() == pytest.approx([expected, 0.0])


def test_top_k_entropy_by_hand() -> None:
    """Of the two likeliest tokens: (1/2, 1/2), (3/4, 1/4), and (1, 0)."""
    logits = torch.tensor([[5.0, 1.0, 5.0], [0.0, math.log(3), -2.0], [-9.0, 1000.0, 0.0]], dtype=torch.float64)
    middle = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert top_k_entropy(logits, 2).tolist() == pytest.approx([1.0, middle, 0.0])


@pytest.mark.parametrize("top_k", [2, 20, 50, 60])
def test_top_k_entropy_equals_loop(top_k: int) -> None:
    logits = 4.0 * torch.randn(7, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for row, found in zip(logits, top_k_entropy(logits, top_k).tolist(), strict=True):
        largest = sorted(row.tolist(), reverse=True)[:top_k]
        total = sum(math.exp(value) for value in largest)
        probabilities = [math.exp(value) / total for value in largest]
        entropy = -sum(p * math.log(p) for p in probabilities)
        # As many tokens as there are.
        assert found == pytest.approx(entropy / math.log(min(top_k, 50)), rel=1e-12)


def test_sequence_token_loss_is_mean_per_sequence() -> None:
    losses = torch.rand(6)
    rows = torch.tensor([2, 0, 2, 2, 0, 3])
    found = sequence_token_loss(losses, rows, 5)
    for row in range(5):
        mine = losses[rows == row]
        expected = mine.mean().item() if len(mine) else 0.0
        assert found[row].item() == pytest.approx(expected, rel=1e-6)
