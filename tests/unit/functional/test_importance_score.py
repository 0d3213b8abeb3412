"""The score of one gradient, on numbers computed by hand, and `grad_x_weight` as the gradient of a gate."""

from __future__ import annotations

import pytest
import torch

from das_ds.config import ImportanceScore
from das_ds.functional.importance import importance_score


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("abs_grad", [3.0, 0.5, 0.0]), ("squared_grad", [9.0, 0.25, 0.0]), ("grad_x_weight", [6.0, 2.0, 0.0])],
)
def test_importance_score_by_hand(kind: ImportanceScore, expected: list[float]) -> None:
    gradient = torch.tensor([-3.0, 0.5, 0.0])
    weight = torch.tensor([2.0, -4.0, 7.0])
    assert importance_score(gradient, weight, kind).tolist() == expected
    assert gradient.tolist() == [-3.0, 0.5, 0.0] and weight.tolist() == [2.0, -4.0, 7.0]


def test_importance_score_sensitivity_is_gate_gradient() -> None:
    weight = torch.randn(3, 4, dtype=torch.float64)
    x = torch.randn(4, dtype=torch.float64)
    gated = weight.clone().requires_grad_()
    gates = torch.ones_like(weight).requires_grad_()
    of_weight = torch.autograd.grad((gated @ x).tanh().sum(), gated)[0]
    of_gates = torch.autograd.grad(((gates * weight) @ x).tanh().sum(), gates)[0]
    torch.testing.assert_close(importance_score(of_weight, weight, "grad_x_weight"), of_gates.abs())
    torch.testing.assert_close(
        importance_score(of_gates, 1.0, "grad_x_weight"), importance_score(of_gates, 1.0, "abs_grad")
    )
