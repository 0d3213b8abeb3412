"""Thresholds of ranks against a sort, on one rank; `tests/smoke/test_masks.py` has complete forms on several."""

from __future__ import annotations

import pytest
import torch

from das_ds.softmask import sharded_normalize
from das_ds.softmask.sharded_normalize import Comparison, find_quantile_thresholds

CPU = torch.device("cpu")
SIZES = {"a": 4000, "b": 57, "c": 1, "d": 300}
OWNERS = {"a": "head", "b": "unowned", "c": "unowned", "d": "head"}


def draw(kind: str, size: int) -> torch.Tensor:
    """Values that are hard for cuts: over all exponents, in one octave, equal in parts, or all 0."""
    drawn = {
        "wide": lambda: torch.randint(0, 0x7F800000, (size,), dtype=torch.int32).view(torch.float32),
        "narrow": lambda: 1 + 1e-4 * torch.rand(size),
        "equal": lambda: torch.randint(0, 5, (size,)).float(),
        "zero": lambda: torch.zeros(size),
    }
    return drawn[kind]()


@pytest.mark.parametrize("num_thresholds", [1, 255])
@pytest.mark.parametrize("scope", ["tensor", "group", "model"])
@pytest.mark.parametrize("kind", ["wide", "narrow", "equal", "zero"])
def test_find_quantile_thresholds_equal_sort(
    kind: str, scope: str, num_thresholds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded_normalize, "CHUNK_ELEMENTS", 1000)
    parts = {name: draw(kind, size) for name, size in SIZES.items()}
    comparison = Comparison.by_scope(scope, OWNERS, SIZES)
    by_comparison = [
        torch.cat([parts[name] for name in SIZES if comparison.indices[name] == number])
        for number in range({"tensor": 4, "group": 2, "model": 1}[scope])
    ]
    assert comparison.num_entries == tuple(len(values) for values in by_comparison)
    counts = torch.stack([torch.randint(0, len(v) + 1, (num_thresholds,)).sort().values for v in by_comparison])
    found = find_quantile_thresholds(parts, comparison, counts, CPU)
    for values, wanted, thresholds in zip(by_comparison, counts, found, strict=True):
        bits = values.view(torch.int32).long().sort().values
        # At least k are less than what lies just above the k-th smallest.
        expected = [0 if k == 0 else int(bits[k - 1]) + 1 for k in wanted.tolist()]
        assert thresholds.tolist() == expected
