"""The elementwise maximum does not depend on order or repetition."""

from __future__ import annotations

import torch

from das_ds.functional.importance import elementwise_maximum


def test_elementwise_maximum_order_free_and_idempotent() -> None:
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


def test_elementwise_maximum_first_does_not_alias() -> None:
    first = {"head": torch.zeros(1, 2)}
    total = elementwise_maximum(first, None)
    total["head"] += 1
    assert first["head"].sum() == 0
