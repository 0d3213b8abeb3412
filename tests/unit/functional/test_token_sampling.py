"""Sampling from logits, against the exact probabilities, and the documents in what is sampled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import TopPLogitsWarper

from das_ds.functional.token_sampling import document_starts, infill_groups, sample_tokens, sample_uniforms

POINTS = 20_000


def shares(logits: torch.Tensor, **settings: float) -> torch.Tensor:
    """Share of each token among equally spaced uniforms."""
    uniforms = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
    tokens = sample_tokens(logits.expand(POINTS, -1), uniforms, **settings)
    return torch.bincount(tokens, minlength=len(logits)).double() / POINTS


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.7), (0.8, 0.9)])
def test_sample_tokens_has_probabilities_of_transformers(temperature: float, top_p: float) -> None:
    logits = 2.0 * torch.randn(40, generator=torch.Generator().manual_seed(1))
    warped = TopPLogitsWarper(top_p)(torch.zeros(1, 0), (logits / temperature)[None])[0]
    expected = warped.double().softmax(dim=0)
    # Each token's interval of uniforms has its probability as length; at each end one point may be off.
    assert (shares(logits, temperature=temperature, top_p=top_p) - expected).abs().max() < 2 / POINTS


def test_sample_tokens_extreme_uniforms_and_excluded_tokens() -> None:
    logits = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf]).expand(2, -1)
    uniforms = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert sample_tokens(logits, uniforms).tolist() == [1, 2]
    assert sample_tokens(logits, uniforms, top_p=1e-9).tolist() == [1, 1]


def test_sample_tokens_rounding_of_logits_moves_only_boundaries() -> None:
    logits = torch.randn(500, 30, generator=torch.Generator().manual_seed(2))
    uniforms = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rounded = logits + 1e-6 * torch.randn(500, 30, generator=torch.Generator().manual_seed(4))
    # A boundary moves by about 1e-6: of 500 uniforms less than one in a hundred tries meets one.
    assert torch.equal(sample_tokens(rounded, uniforms), sample_tokens(logits, uniforms))


def test_sample_uniforms_depend_on_number_only() -> None:
    together = sample_uniforms(5, "generate/a", [3, 7, 8], 16)
    assert np.array_equal(together[1:2], sample_uniforms(5, "generate/a", [7], 16))
    assert not np.array_equal(together[0], together[1])
    assert not np.array_equal(together, sample_uniforms(5, "generate/b", [3, 7, 8], 16))
    assert not np.array_equal(together, sample_uniforms(6, "generate/a", [3, 7, 8], 16))


def test_infill_groups_have_equal_sizes() -> None:
    groups = infill_groups(0, "generate/a", range(5), 30, 7)
    for row in groups:
        assert set(np.bincount(row, minlength=7)) == {4, 5}
    assert len({tuple(row) for row in groups}) == 5


@pytest.mark.parametrize(
    ("begins_with_end", "expected"),
    [
        # </s> a </s> </s> b c: a document of one token, then one that ends, then ...
        (False, [1, 1, 0, 1, 1, 0]),
        # ... or "</s> a </s>" and "</s> b c".
        (True, [1, 0, 0, 1, 0, 0]),
    ],
)
def test_document_starts_after_end(begins_with_end: bool, expected: list[int]) -> None:
    tokens = torch.tensor([[2, 5, 2, 2, 6, 7]])
    assert document_starts(tokens, 2, begins_with_end=begins_with_end).long().tolist() == [expected]
