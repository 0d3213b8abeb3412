"""Every form of normalization against closed forms, loops and a sort."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from das_ds.config import ImportanceConfig
from das_ds.functional.importance import histogram, normalize, normalize_units
from helpers import reference

FORMS = ("abs_tanh", "tanh_positive", "rank_hard", "rank_soft", "saturating")


def settings(form: str, **changes: Any) -> ImportanceConfig:
    return ImportanceConfig(normalization=form, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["abs_tanh", "tanh_positive"])
def test_normalize_standardized_forms_equal_formula(form: str) -> None:
    raw = torch.rand(3, 41) ** 4
    expected = reference.normalize(raw.double(), form)  # type: ignore[arg-type]
    torch.testing.assert_close(normalize(raw, settings(form)), expected.float(), rtol=1e-6, atol=1e-6)


def test_normalize_standardized_forms_by_hand() -> None:
    # Mean 2, population std 1: z = -1, 1.
    found = normalize(torch.tensor([[1.0, 3.0]]), settings("abs_tanh"))
    assert found.tolist() == [[pytest.approx(math.tanh(1.0)), pytest.approx(math.tanh(1.0))]]
    found = normalize(torch.tensor([[1.0, 3.0]]), settings("tanh_positive"))
    assert found.tolist() == [[0.0, pytest.approx(math.tanh(1.0))]]


def test_normalize_saturating_by_hand() -> None:
    # Mean 2: 0 / 4, 1 / 5, 5 / 9 at c = 2.
    found = normalize(torch.tensor([[0.0, 1.0, 5.0]]), settings("saturating", half_saturation=2.0))
    assert found.tolist() == [[0.0, pytest.approx(1 / 5), pytest.approx(5 / 9)]]
    assert not normalize(torch.zeros(2, 3), settings("saturating")).any()


@pytest.mark.parametrize(
    ("share", "num_entries", "expected"), [(0.3, 10, 3), (0.29, 100, 29), (0.5, 3, 2), (0.1, 3, 0)]
)
def test_normalize_rank_hard_protects_given_fraction(share: float, num_entries: int, expected: int) -> None:
    raw = torch.randperm(num_entries)[None].float()
    found = normalize(raw, settings("rank_hard", protected_fraction=share))
    assert torch.equal(found, (raw >= num_entries - expected).float())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_normalize_rank_soft_has_given_mean(share: float) -> None:
    raw = torch.rand(2, 1001) ** 6
    found = normalize(raw, settings("rank_soft", protected_fraction=share))
    for row, importance in zip(raw, found, strict=True):
        rank = torch.tensor([(row < value).sum() for value in row]) / len(row)
        torch.testing.assert_close(importance, rank ** ((1 - share) / share), rtol=1e-5, atol=1e-7)
        assert importance.mean().item() == pytest.approx(share, abs=2e-3)


def test_normalize_equal_entries_have_equal_rank() -> None:
    raw = torch.tensor([[2.0, 0.0, 1.0, 1.0, 0.0, 1.0, 3.0, 0.0]])
    # Half of the entries: the edge would lie between the ones, so none of them is protected.
    assert normalize(raw, settings("rank_hard")).tolist() == [[1, 0, 0, 0, 0, 0, 1, 0]]
    assert normalize(raw, settings("rank_hard", protected_fraction=0.625)).tolist() == [[1, 0, 1, 1, 0, 1, 1, 0]]
    expected = [[6 / 8, 0, 3 / 8, 3 / 8, 0, 3 / 8, 7 / 8, 0]]
    assert normalize(raw, settings("rank_soft")).tolist() == expected


@pytest.mark.parametrize("form", [form for form in FORMS if form != "saturating"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e-30])
def test_normalize_equal_importance_is_zero(value: float, form: str) -> None:
    assert torch.equal(normalize(torch.full((2, 7), value), settings(form)), torch.zeros(2, 7))


@pytest.mark.parametrize("form", FORMS)
def test_normalize_rows_are_independent(form: str) -> None:
    raw = torch.rand(1, 9)
    both = normalize(torch.cat((raw, 1e-6 * raw)), settings(form))
    torch.testing.assert_close(both[0], both[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_normalize_units_scope_sets_comparison(form: str) -> None:
    raw = {"head": torch.rand(2, 3), "output": 0.1 * torch.rand(2, 5), "intermediate": 3 * torch.rand(2, 8)}
    by_tensor, by_group, by_model = (
        normalize_units(raw, settings(form, scope=scope)) for scope in ("tensor", "group", "model")
    )
    everything = normalize(torch.cat([raw[group].flatten() for group in raw])[None], settings(form))[0].tolist()
    for group, values in raw.items():
        for layer, row in enumerate(values):
            assert torch.equal(by_tensor[group][layer], normalize(row[None], settings(form))[0])
        assert torch.equal(by_group[group].flatten(), normalize(values.flatten()[None], settings(form))[0])
        assert by_model[group].flatten().tolist() == everything[: values.numel()]
        everything = everything[values.numel() :]
    assert everything == []


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("num_entries", [1, 7, 1000])
@pytest.mark.parametrize("form", ["rank_hard", "rank_soft"])
def test_histogram_counts_give_rounded_importance(form: str, num_entries: int, share: float) -> None:
    chosen = settings(form, protected_fraction=share)
    raw = torch.arange(num_entries)[None].float()
    counts = histogram(num_entries, chosen, 255)
    # Entry i has i less important ones.
    reached = (torch.arange(num_entries)[:, None] >= counts).sum(dim=1) * (255 // len(counts))
    # Halves may be rounded up or down.
    assert (reached - 255 * normalize(raw, chosen)[0].double()).abs().max() <= 0.5 + 1e-4
