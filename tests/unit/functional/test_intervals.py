"""Intervals and p-values against brute force; what few seeds cannot say."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import numpy
import pytest

from das_ds.functional.intervals import (
    bootstrap_interval,
    estimate,
    largest_coverage,
    paired_difference,
    sign_flip_p_value,
)

VALUES = [0.31, 0.42, 0.27, 0.55, 0.36, 0.71, 0.18, 0.44, 0.39]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_interval_of_few_seeds_is_that_of_all_resamples(size: int) -> None:
    means = sorted(sum(resample) / size for resample in itertools.product(VALUES[:size], repeat=size))
    for found, share in zip(bootstrap_interval(VALUES[:size], level=0.9), (0.05, 0.95), strict=True):
        # The smallest mean that so large a share of all lies at or below.
        expected = next(mean for place, mean in enumerate(means, start=1) if place >= share * len(means) - 1e-9)
        assert found == pytest.approx(expected, rel=1e-12)


def test_two_seeds_give_back_their_range() -> None:
    assert bootstrap_interval([3.0, 1.0]) == (1.0, 3.0)


def test_interval_of_many_seeds_agrees_with_other_draws() -> None:
    draw = random.Random(0)
    means = sorted(sum(draw.choices(VALUES, k=len(VALUES))) / len(VALUES) for _ in range(50_000))
    assert bootstrap_interval(VALUES) == pytest.approx((means[1249], means[48_749]), abs=3e-3)
    assert bootstrap_interval(VALUES) == bootstrap_interval(VALUES)
    assert bootstrap_interval(VALUES) != bootstrap_interval(VALUES, seed=1)


def test_estimate_of_one_seed_has_no_interval() -> None:
    found = estimate([2.5])
    assert (found.mean, found.low, found.high, found.num_seeds) == (2.5, None, None, 1)


def test_pairs_cancel_what_a_seed_does_to_both() -> None:
    seed_effect, effect = numpy.array([5.0, -3.0, 8.0, 0.5]), numpy.array([0.1, 0.2, 0.1, 0.2])
    found = paired_difference(seed_effect + effect, seed_effect)
    alone = estimate(effect)
    assert (found.mean, found.low, found.high) == pytest.approx((0.15, alone.low, alone.high))
    assert found.p_value == 2 / 2**4


@pytest.mark.parametrize("differences", [[0.3, -0.1, 0.2], [1.0, 2.0, 3.0, 4.0, 5.0], [0.1, 0.1, -0.1, 0.1], VALUES])
def test_p_value_counts_all_flips(differences: list[float]) -> None:
    # Exact arithmetic, in which ties are ties.
    numbers = [Fraction(str(value)) for value in differences]
    flips = [sum(map(Fraction.__mul__, numbers, map(Fraction, signs))) for signs in _signs(len(numbers))]
    expected = sum(abs(flip) >= abs(sum(numbers)) for flip in flips) / len(flips)
    assert sign_flip_p_value(differences) == pytest.approx(expected)


def _signs(size: int) -> itertools.product[tuple[int, ...]]:
    return itertools.product((1, -1), repeat=size)


def test_p_value_of_many_pairs_is_near_the_exact_one() -> None:
    differences = numpy.random.default_rng(0).normal(0.4, 1.0, size=18)
    signs = 1 - 2 * (numpy.arange(2**18)[:, None] >> numpy.arange(18) & 1)
    exact = (abs(signs @ differences) >= abs(differences.sum())).mean()
    assert sign_flip_p_value(differences) == pytest.approx(exact, abs=0.01)
    assert sign_flip_p_value(numpy.full(18, 1.0)) > 0.0


def test_nothing_follows_from_one_pair_or_from_no_difference() -> None:
    assert sign_flip_p_value([3.0]) == sign_flip_p_value([0.0, 0.0, 0.0]) == 1.0


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_an_interval_covers_no_more_often_than_the_range_of_its_seeds(num_seeds: int) -> None:
    draws = numpy.random.default_rng(0).normal(size=(4000, num_seeds))
    in_range = ((draws.min(axis=1) <= 0) & (draws.max(axis=1) >= 0)).mean()
    assert in_range == pytest.approx(largest_coverage(num_seeds), abs=0.03)
    ends = numpy.array([bootstrap_interval(draw) for draw in draws[:300]])
    covered = ((ends[:, 0] <= 0) & (ends[:, 1] >= 0)).mean()
    assert covered <= largest_coverage(num_seeds) + 0.05


def test_no_values_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError, match=r"one number per seed, found shape \(0,\)"):
        estimate([])
