"""Intervals and p-values, compared with scipy and with brute force."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy
import pytest
from scipy import stats

from das_ds.reporting.statistics import estimate, holm, paired_difference, sign_flip_p_value, t_interval, t_quantile

VALUES = [0.31, 0.42, 0.27, 0.55, 0.36, 0.71, 0.18, 0.44, 0.39]


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 7, 10, 29, 100])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
def test_t_quantile_equals_scipy(level: float, degrees: int) -> None:
    assert t_quantile(level, degrees) == pytest.approx(stats.t.ppf((1 + level) / 2, degrees), rel=1e-9)


@pytest.mark.parametrize("size", [2, 3, 6, 9])
def test_t_interval_equals_scipy(size: int) -> None:
    values = VALUES[:size]
    expected = stats.t.interval(0.9, size - 1, loc=numpy.mean(values), scale=stats.sem(values))
    assert t_interval(values, level=0.9) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("size", [3, 6, 9])
def test_paired_difference_interval_equals_scipy_ttest_rel(size: int) -> None:
    values = VALUES[:size]
    reference = VALUES[::-1][:size]
    expected = stats.ttest_rel(values, reference).confidence_interval(0.95)
    found = paired_difference(values, reference)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


@pytest.mark.parametrize("num_seeds", [2, 3, 6])
def test_t_interval_normal_seeds_has_nominal_coverage(num_seeds: int) -> None:
    draws = numpy.random.default_rng(0).normal(size=(4000, num_seeds))
    ends = numpy.array([t_interval(draw) for draw in draws])
    covered = ((ends[:, 0] <= 0) & (ends[:, 1] >= 0)).mean()
    # Four standard errors of a share of 0.95 in 4000 draws.
    assert covered == pytest.approx(0.95, abs=0.014)


def test_holm_worked_example() -> None:
    # Smallest times 4; next times 3; then 2 * 0.03 = 0.06 and the last, 0.04, may not fall below it.
    assert holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.01, 0.02], num_tests=4) == pytest.approx(holm([0.01, 0.02, 1.0, 1.0])[:2])
    assert holm([]) == []


def test_holm_rejects_like_the_step_down_procedure() -> None:
    draws = numpy.random.default_rng(0).uniform(size=(200, 5)) ** 3
    for p_values in draws:
        rejected = set()
        for place, index in enumerate(numpy.argsort(p_values)):
            if p_values[index] > 0.05 / (5 - place):
                break
            rejected.add(int(index))
        assert {index for index, value in enumerate(holm(p_values.tolist())) if value <= 0.05} == rejected


def test_estimate_of_one_seed_has_no_interval() -> None:
    found = estimate([2.5])
    assert (found.mean, found.low, found.high, found.num_seeds) == (2.5, None, None, 1)


def test_paired_difference_common_seed_effect_cancels() -> None:
    seed_effect = numpy.array([5.0, -3.0, 8.0, 0.5])
    effect = numpy.array([0.1, 0.2, 0.1, 0.2])
    found = paired_difference(seed_effect + effect, seed_effect)
    alone = estimate(effect)
    assert (found.mean, found.low, found.high) == pytest.approx((0.15, alone.low, alone.high))
    assert found.p_value == 2 / 2**4


@pytest.mark.parametrize("differences", [[0.3, -0.1, 0.2], [1.0, 2.0, 3.0, 4.0, 5.0], [0.1, 0.1, -0.1, 0.1], VALUES])
def test_sign_flip_p_value_counts_all_flips(differences: list[float]) -> None:
    # Exact arithmetic, in which ties are ties.
    numbers = [Fraction(str(value)) for value in differences]
    flips = [sum(map(Fraction.__mul__, numbers, map(Fraction, signs))) for signs in _signs(len(numbers))]
    expected = sum(abs(flip) >= abs(sum(numbers)) for flip in flips) / len(flips)
    assert sign_flip_p_value(differences) == pytest.approx(expected)


@pytest.mark.parametrize("differences", [[1.0, 2.0, 3.0, 4.0, 5.0], VALUES, [0.3, -0.15, 0.2, 0.45, -0.25, 0.6]])
def test_sign_flip_p_value_equals_scipy_permutation_test(differences: list[float]) -> None:
    expected = stats.permutation_test((differences,), numpy.mean, permutation_type="samples", n_resamples=numpy.inf)
    assert sign_flip_p_value(differences) == pytest.approx(expected.pvalue)


def _signs(size: int) -> itertools.product[tuple[int, ...]]:
    return itertools.product((1, -1), repeat=size)


def test_sign_flip_p_value_many_pairs_is_near_exact() -> None:
    differences = numpy.random.default_rng(0).normal(0.4, 1.0, size=18)
    signs = 1 - 2 * (numpy.arange(2**18)[:, None] >> numpy.arange(18) & 1)
    exact = (abs(signs @ differences) >= abs(differences.sum())).mean()
    assert sign_flip_p_value(differences) == pytest.approx(exact, abs=0.01)
    assert sign_flip_p_value(numpy.full(18, 1.0)) > 0.0


def test_sign_flip_p_value_one_pair_or_no_difference_is_one() -> None:
    assert sign_flip_p_value([3.0]) == sign_flip_p_value([0.0, 0.0, 0.0]) == 1.0


def test_estimate_no_values_is_an_assertion_error() -> None:
    with pytest.raises(AssertionError, match=r"one number per seed, found shape \(0,\)"):
        estimate([])
