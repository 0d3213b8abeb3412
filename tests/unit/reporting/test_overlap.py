"""Overlap of claims, against set arithmetic."""

from __future__ import annotations

import pytest
import torch

from das_ds.reporting.overlap import Overlap, expected_jaccard


def test_overlap_any_chunks_equals_set_arithmetic() -> None:
    importance = torch.rand(3, 1000, generator=torch.Generator().manual_seed(0))
    importance[2] = (importance[0] + importance[2]) / 2
    overlap = Overlap(3, 0.7)
    for chunk in importance.split(384, dim=1):
        overlap.add(chunk)
    claims = [{unit for unit, value in enumerate(row.tolist()) if value >= 0.7} for row in importance.float()]
    for a, row in enumerate(importance.double()):
        assert overlap.unit_shares()[a].item() == pytest.approx(len(claims[a]) / 1000)
        for b, other in enumerate(importance.double()):
            expected = len(claims[a] & claims[b]) / len(claims[a] | claims[b])
            assert overlap.jaccard()[a, b].item() == pytest.approx(expected)
            cosine = torch.nn.functional.cosine_similarity(row, other, dim=0)
            assert overlap.cosine()[a, b].item() == pytest.approx(cosine.item())


def test_overlap_no_claims_is_zero() -> None:
    overlap = Overlap(2, 0.9)
    overlap.add(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    assert overlap.jaccard().tolist() == overlap.cosine().tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert overlap.unit_shares().tolist() == [0.0, 0.5]


def test_expected_jaccard_worked_example() -> None:
    generator = torch.Generator().manual_seed(0)
    claims = torch.rand(2, 200_000, generator=generator) < torch.tensor([[0.3], [0.1]])
    overlap = Overlap(2, 0.5)
    overlap.add(claims.float())
    assert overlap.jaccard()[0, 1].item() == pytest.approx(expected_jaccard(0.3, 0.1), abs=3e-3)
    assert expected_jaccard(0.0, 0.0) == 0.0 and expected_jaccard(1.0, 1.0) == 1.0
