"""Normalisation, EMax and the per-sequence sum against closed forms and loops."""

from __future__ import annotations

import math

import pytest
import torch

from das_ds.functional.importance import elementwise_maximum, normalise
from helpers import reference


@pytest.mark.parametrize("form", ["abs_tanh", "tanh_positive"])
def test_normalise_equals_the_formula(form: str) -> None:
    raw = torch.rand(3, 41) ** 4
    expected = reference.normalise(raw.double(), form)  # type: ignore[arg-type]
    torch.testing.assert_close(normalise(raw, form), expected.float(), rtol=1e-6, atol=1e-6)


def test_normalise_closed_form() -> None:
    # Mean 2, population std 1: z = -1, 1.
    found = normalise(torch.tensor([[1.0, 3.0]]), "abs_tanh")
    assert found.tolist() == [[pytest.approx(math.tanh(1.0)), pytest.approx(math.tanh(1.0))]]
    assert normalise(torch.tensor([[1.0, 3.0]]), "tanh_positive").tolist() == [[0.0, pytest.approx(math.tanh(1.0))]]


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e-30])
def test_equal_importance_protects_nothing(value: float) -> None:
    found = normalise(torch.full((2, 7), value), "abs_tanh")
    assert torch.equal(found, torch.zeros(2, 7))


def test_each_layer_has_its_own_scale() -> None:
    raw = torch.rand(1, 9)
    both = normalise(torch.cat((raw, 1e-6 * raw)), "abs_tanh")
    torch.testing.assert_close(both[0], both[1], rtol=1e-4, atol=1e-6)


def test_normalise_rejects_unknown_form() -> None:
    with pytest.raises(ValueError, match="abs_tanh, tanh_positive"):
        normalise(torch.rand(1, 3), "softmax")


def test_maximum_is_order_free_and_idempotent() -> None:
    parts = [{"head": torch.rand(2, 3), "output": torch.rand(2, 5)} for _ in range(3)]

    def accumulate(order: list[int]) -> dict[str, torch.Tensor]:
        total = None
        for index in order:
            total = elementwise_maximum(parts[index], total)
        assert total is not None
        return total

    expected = {g: torch.stack([p[g] for p in parts]).amax(0) for g in parts[0]}
    for order in ([0, 1, 2], [2, 0, 1], [0, 1, 2, 1, 0]):
        found = accumulate(order)
        assert all(torch.equal(found[g], expected[g]) for g in expected)


def test_first_maximum_does_not_alias() -> None:
    first = {"head": torch.zeros(1, 2)}
    total = elementwise_maximum(first, None)
    total["head"] += 1
    assert first["head"].sum() == 0
