"""Statistics for few seeds: t intervals, exact sign-flip tests, Holm's correction, Pareto fronts.

Shape legend: S seeds, F sign flips, M tests of a family, G points.

With few seeds a t interval is wide because the standard deviation is itself estimated: it reaches 9 standard deviations
to either side with 2 seeds, and 1 with 6. The sign-flip test assumes no distribution, but has no p-value below 0.05
with fewer than 6 pairs; for one of M tests to survive Holm's correction at that level, log2(20 M) + 1 pairs are needed.

scipy is a development dependency only; the tests compare each function with the scipy equivalent that it names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
MAX_EXACT_FLIPS = 50_000
"""Up to this many, all sign flips are enumerated; beyond, this many are sampled."""
BISECTIONS = 60
"""Halvings of a right angle down to the last bit of a float64."""

Values = NDArray[numpy.float64]
Point = tuple[float, float]
"""Loss after learning, and forgetting; lower is better in both."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval."""

    mean: float
    low: float | None
    """Lower end of the interval; None for a single seed."""
    high: float | None
    num_seeds: int


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean difference between two methods, paired by seed."""

    p_value: float
    """Of the exact two-sided sign-flip test; 1 for a single seed."""


def estimate(values: ArrayLike, *, level: float = LEVEL) -> Estimate:
    """Mean and t interval.

    Args:
        values: (S,) one value per seed, S >= 1.
        level: confidence level, exact for normally distributed errors.
    """
    values_S = _to_vector(values)
    low, high = t_interval(values_S, level=level) if len(values_S) > 1 else (None, None)
    return Estimate(float(values_S.mean()), low, high, len(values_S))


def paired_difference(values: ArrayLike, reference: ArrayLike, *, level: float = LEVEL, seed: int = 0) -> Difference:
    """Mean of values - reference, its t interval and its p-value; effects of the seed common to both cancel.

    scipy equivalent: `ttest_rel(values, reference).confidence_interval(level)` for the interval.

    Args:
        values: (S,) one value per seed.
        reference: (S,) of the same seeds in the same order.
        level: as for `estimate`.
        seed: as for `sign_flip_p_value`.
    """
    differences_S = _to_vector(values) - _to_vector(reference)
    mean = estimate(differences_S, level=level)
    p_value = sign_flip_p_value(differences_S, seed=seed)
    return Difference(mean.mean, mean.low, mean.high, mean.num_seeds, p_value)


def t_interval(values: ArrayLike, *, level: float = LEVEL) -> tuple[float, float]:
    """mean -+ t s / sqrt(S), t the (1 + level) / 2 quantile of Student's t with S - 1 degrees of freedom.

    Student, *The probable error of a mean*, Biometrika 1908; s is the standard deviation with S - 1 in its denominator.

    scipy equivalent: `t.interval(level, S - 1, loc=mean(values), scale=sem(values))`.

    Args:
        values: (S,), S >= 2.
        level: confidence level, exact for normally distributed values.
    """
    values_S = _to_vector(values)
    size = len(values_S)
    half_width = t_quantile(level, size - 1) * float(values_S.std(ddof=1)) / math.sqrt(size)
    mean = float(values_S.mean())
    return mean - half_width, mean + half_width


def t_quantile(level: float, degrees_of_freedom: int) -> float:
    """The t with P(|T| <= t) = level for Student's t.

    Found by bisection in theta = atan(t / sqrt(df)) of the finite sums for integer df (Abramowitz & Stegun, *Handbook
    of Mathematical Functions*, 1964, 26.7.3 and 26.7.4).

    scipy equivalent: `t.ppf((1 + level) / 2, df)`.

    Args:
        level: between 0 and 1.
        degrees_of_freedom: df >= 1.
    """
    low = 0.0
    high = math.pi / 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if _t_probability(middle, degrees_of_freedom) < level:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees_of_freedom) * math.tan(low)


def _t_probability(theta: float, degrees_of_freedom: int) -> float:
    """P(|T| <= sqrt(df) tan(theta))."""
    sine = math.sin(theta)
    cosine = math.cos(theta)
    is_odd = degrees_of_freedom % 2 == 1
    # Odd: cos + 2/3 cos^3 + 2*4/(3*5) cos^5 + ...; even: 1 + 1/2 cos^2 + 1*3/(2*4) cos^4 + ...
    term = cosine if is_odd else 1.0
    total = 0.0
    for power in range(2 if is_odd else 1, degrees_of_freedom, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    return 2 / math.pi * (theta + sine * total) if is_odd else sine * total


def sign_flip_p_value(differences: ArrayLike, *, seed: int = 0) -> float:
    """Probability of a mean at least as far from 0 if every difference is equally likely to have the other sign.

    The randomization test for paired samples (Fisher, *The Design of Experiments*, 1935, section 21), two-sided:
    P(|mean(e * d)| >= |mean(d)|) over signs e. All 2^S flips are enumerated up to S = 15, which makes the test exact;
    beyond, `MAX_EXACT_FLIPS` random flips are used, the observed signs among them.

    scipy equivalent: `permutation_test((d,), mean, permutation_type="samples", n_resamples=inf)`, which for one sample
    flips signs.

    Args:
        differences: d (S,), S >= 1.
        seed: of the random flips.
    """
    differences_S = _to_vector(differences)
    size = len(differences_S)
    if 2**size <= MAX_EXACT_FLIPS:
        # Bit s of the index of a flip says whether it changes the sign of difference s.
        bits_FS = numpy.arange(2**size)[:, None] >> numpy.arange(size) & 1
    else:
        bits_FS = numpy.random.default_rng(seed).integers(2, size=(MAX_EXACT_FLIPS, size))
        bits_FS[0] = 0
    sums_F = numpy.abs((1 - 2 * bits_FS) @ differences_S)
    # Sums in another order differ in their last digits; the tolerance keeps ties from being counted as smaller.
    observed = abs(differences_S.sum()) - 1e-12 * numpy.abs(differences_S).sum()
    return float((sums_F >= observed).mean())


def holm(p_values: Sequence[float], num_tests: int | None = None) -> list[float]:
    """Holm's step-down correction, which bounds the probability of any false positive in a family of tests.

    p~_(i) = max_{j <= i} min(1, (M - j + 1) p_(j)) over ascending p-values (Holm, *A simple sequentially rejective
    multiple test procedure*, Scandinavian Journal of Statistics 1979).

    scipy equivalent: none; `multipletests(p_values, method="holm")` of statsmodels.

    Args:
        p_values: of tests that were chosen before their results were seen.
        num_tests: M, if the family has more tests, which could not be made; they count as p-values of 1.

    Returns:
        Corrected p-values in the order of `p_values`.
    """
    size = max(num_tests or 0, len(p_values))
    ascending = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(ascending):
        largest = max(largest, min(1.0, (size - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other point dominates (is as good in both coordinates and better in one).

    Args:
        points: G points; lower is better.

    Returns:
        Indices in ascending order of the points.
    """
    values_G2 = numpy.asarray(points, dtype=numpy.float64).reshape(-1, 2)
    # Entry (i, j): point i compared with point j.
    no_worse_GG = (values_G2[:, None] <= values_G2[None]).all(axis=2)
    better_GG = (values_G2[:, None] < values_G2[None]).any(axis=2)
    is_dominated_G = (no_worse_GG & better_GG).any(axis=0)
    return sorted(numpy.flatnonzero(~is_dominated_G).tolist(), key=lambda index: points[index])


def interpolate_front(points: Sequence[Point], x: float) -> float | None:
    """Piecewise linear interpolation at x; None outside the range of the points, where it would extrapolate.

    numpy equivalent: `numpy.interp` over sorted points.

    Args:
        points: in any order.
        x: first coordinate.
    """
    ordered = sorted(points)
    if len(ordered) < 2 or not ordered[0][0] <= x <= ordered[-1][0]:
        return None
    x_values, y_values = zip(*ordered, strict=True)
    return float(numpy.interp(x, x_values, y_values))


def _to_vector(values: ArrayLike) -> Values:
    vector = numpy.asarray(values, dtype=numpy.float64)
    assert vector.ndim == 1 and vector.size, f"expected one number per seed, found shape {vector.shape}"
    return vector
