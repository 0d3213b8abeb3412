"""What a few seeds say about a mean: Student's t intervals, exact sign-flip tests, and Holm's correction of p-values.

Shape legend: S seeds, F flips, M tests of a family.

A t interval is as wide as a spread that is itself only estimated demands: with 2 seeds it reaches 9 standard deviations
to either side, with 6 one. The sign-flip test needs no distribution, but of fewer than 6 pairs it has no p-value below
0.05, and a family of M tests needs log2(20 M) + 1 pairs for one of them to survive Holm's correction at that level.

Learning against forgetting: which points no other beats, and what a line of points says at another place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
MOST_ENUMERATED = 50_000
"""Up to here all flips are taken, beyond it as many at random."""
BISECTIONS = 60
"""Halvings of a right angle, to the last bit of a float64."""

Values = NDArray[numpy.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval."""

    mean: float
    low: float | None
    """Lower end of the interval; None for a single seed, which says nothing of its spread."""
    high: float | None
    num_seeds: int


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean difference between two methods, paired by seed."""

    p_value: float
    """Of the exact sign-flip test, two-sided; 1 for a single seed."""


def estimate(values: ArrayLike, *, level: float = LEVEL) -> Estimate:
    """Mean and t interval.

    Args:
        values: (S,) one number per seed, S >= 1.
        level: how often such an interval holds the true mean, where seeds err normally.
    """
    numbers = _vector(values)
    low, high = t_interval(numbers, level=level) if len(numbers) > 1 else (None, None)
    return Estimate(float(numbers.mean()), low, high, len(numbers))


def paired_difference(these: ArrayLike, others: ArrayLike, *, level: float = LEVEL, seed: int = 0) -> Difference:
    """Mean of these - others, its t interval and its p-value; what a seed does to both cancels.

    Args:
        these: (S,) one number per seed.
        others: (S,) of the same seeds in the same order.
        level: as for `estimate`.
        seed: as for `sign_flip_p_value`.
    """
    differences = _vector(these) - _vector(others)
    found = estimate(differences, level=level)
    p_value = sign_flip_p_value(differences, seed=seed)
    return Difference(found.mean, found.low, found.high, found.num_seeds, p_value)


def t_interval(values: ArrayLike, *, level: float = LEVEL) -> tuple[float, float]:
    """mean -+ t s / sqrt(S), t the (1 + level) / 2 quantile of Student's t with S - 1 degrees of freedom.

    Student, *The probable error of a mean*, Biometrika 1908; s is the standard deviation with S - 1 in its denominator.

    Args:
        values: (S,), S >= 2.
        level: how often the interval holds the true mean, where values err normally.
    """
    numbers = _vector(values)
    size = len(numbers)
    arm = t_quantile(level, size - 1) * float(numbers.std(ddof=1)) / math.sqrt(size)
    mean = float(numbers.mean())
    return mean - arm, mean + arm


def t_quantile(level: float, degrees: int) -> float:
    """The t with P(|T| <= t) = level for Student's t with so many degrees of freedom.

    Found by bisection in theta = atan(t / sqrt(degrees)) of the finite sums for whole degrees (Abramowitz & Stegun,
    *Handbook of Mathematical Functions*, 1964, 26.7.3 and 26.7.4).

    Args:
        level: between 0 and 1.
        degrees: of freedom, >= 1.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if _t_probability(middle, degrees) < level:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def _t_probability(theta: float, degrees: int) -> float:
    """P(|T| <= sqrt(degrees) tan(theta))."""
    sine, cosine = math.sin(theta), math.cos(theta)
    is_odd = degrees % 2 == 1
    # Odd: cos + 2/3 cos^3 + 2*4/(3*5) cos^5 + ...; even: 1 + 1/2 cos^2 + 1*3/(2*4) cos^4 + ...
    term = cosine if is_odd else 1.0
    total = 0.0
    for power in range(2 if is_odd else 1, degrees, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    return 2 / math.pi * (theta + sine * total) if is_odd else sine * total


def holm(p_values: Sequence[float], num_tests: int | None = None) -> list[float]:
    """p-values corrected for the number of tests: the chance that any of a family without effects looks so good.

    p~_(i) = max_{j <= i} min(1, (M - j + 1) p_(j)) over ascending p-values (Holm, *A simple sequentially rejective
    multiple test procedure*, Scandinavian Journal of Statistics 1979).

    Args:
        p_values: of the tests of a family that was fixed before they were seen.
        num_tests: M, where the family has tests besides that could not be made; they count as p-values of 1.

    Returns:
        As many as `p_values`, in the same order.
    """
    size = max(num_tests or 0, len(p_values))
    ascending = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(ascending):
        largest = max(largest, min(1.0, (size - place) * p_values[index]))
        corrected[index] = largest
    return corrected


def sign_flip_p_value(differences: ArrayLike, *, seed: int = 0) -> float:
    """How often a mean at least as far from 0 comes about where each difference could as well have the other sign.

    The randomisation test for paired samples (Fisher, *The Design of Experiments*, 1935, section 21), two-sided:
    P(|mean(e * d)| >= |mean(d)|) over signs e. All 2^S flips are taken up to S = 15, which makes it exact; beyond that
    `MOST_ENUMERATED` random ones and the one that was seen.

    Args:
        differences: (S,), S >= 1.
        seed: of random flips.
    """
    numbers = _vector(differences)
    size = len(numbers)
    if 2**size <= MOST_ENUMERATED:
        bits_FS = numpy.arange(2**size)[:, None] >> numpy.arange(size) & 1
    else:
        bits_FS = numpy.random.default_rng(seed).integers(2, size=(MOST_ENUMERATED, size))
        bits_FS[0] = 0
    sums_F = numpy.abs((1 - 2 * bits_FS) @ numbers)
    # Sums in another order differ in their last digits, which must not tell a tie from a smaller one.
    least = abs(numbers.sum()) - 1e-12 * numpy.abs(numbers).sum()
    return float((sums_F >= least).mean())


def _vector(values: ArrayLike) -> Values:
    numbers = numpy.asarray(values, dtype=numpy.float64)
    assert numbers.ndim == 1 and numbers.size, f"expected one number per seed, found shape {numbers.shape}"
    return numbers


Point = tuple[float, float]
"""Loss right after learning, and forgetting; both are better when smaller."""


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Positions of the points that no other point equals or beats in both numbers and beats in one, left to right.

    Args:
        points: G points.
    """
    values_G2 = numpy.asarray(points, dtype=numpy.float64).reshape(-1, 2)
    no_worse_GG = (values_G2[:, None] <= values_G2[None]).all(axis=2)
    better_GG = (values_G2[:, None] < values_G2[None]).any(axis=2)
    is_beaten_G = (no_worse_GG & better_GG).any(axis=0)
    return sorted(numpy.flatnonzero(~is_beaten_G).tolist(), key=lambda position: points[position])


def interpolate_front(points: Sequence[Point], place: float) -> float | None:
    """Height at `place` of the broken line through points; None beyond its ends, where it would be a guess.

    Args:
        points: in any order.
        place: first coordinate.
    """
    ordered = sorted(points)
    if len(ordered) < 2 or not ordered[0][0] <= place <= ordered[-1][0]:
        return None
    across, up = zip(*ordered, strict=True)
    return float(numpy.interp(place, across, up))
