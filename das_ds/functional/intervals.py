"""What a few seeds say about a mean: bootstrap intervals and sign-flip tests, the same numbers at every call.

Shape legend: S seeds, R resamples, F flips.

A percentile interval of S values lies between the smallest and the largest of them. Where errors are symmetric, the
true mean lies outside of all S values with probability 2^(1-S): half the time for 2 seeds, 6 % for 5. So with fewer
than 6 seeds no such interval covers the true mean in 95 % of cases (`largest_coverage`), and for the same reason no
sign-flip test of fewer than 6 pairs has a p-value below 0.05.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
MOST_ENUMERATED = 50_000
"""Up to here all resamples or flips are taken, beyond it as many at random."""

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


def estimate(values: ArrayLike, *, level: float = LEVEL, seed: int = 0) -> Estimate:
    """Mean and percentile interval.

    Args:
        values: (S,) one number per seed, S >= 1.
        level: share of the bootstrap distribution that the interval holds.
        seed: of the resamples, where they are drawn at random.
    """
    numbers = _vector(values)
    low, high = bootstrap_interval(numbers, level=level, seed=seed) if len(numbers) > 1 else (None, None)
    return Estimate(float(numbers.mean()), low, high, len(numbers))


def paired_difference(these: ArrayLike, others: ArrayLike, *, level: float = LEVEL, seed: int = 0) -> Difference:
    """Mean of these - others, its interval and its p-value; what a seed does to both cancels.

    Args:
        these: (S,) one number per seed.
        others: (S,) of the same seeds in the same order.
        level, seed: as for `estimate`.
    """
    differences = _vector(these) - _vector(others)
    found = estimate(differences, level=level, seed=seed)
    p_value = sign_flip_p_value(differences, seed=seed)
    return Difference(found.mean, found.low, found.high, found.num_seeds, p_value)


def bootstrap_interval(values: ArrayLike, *, level: float = LEVEL, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean (Efron & Tibshirani, *An Introduction to the Bootstrap*, 1993, section 13.3).

    The quantiles (1 - level) / 2 and (1 + level) / 2 of the means of resamples of S values with replacement. All S^S
    resamples are equally likely and are enumerated up to S = 6; beyond that as many as `MOST_ENUMERATED` are drawn.

    Args:
        values: (S,), S >= 1.
        level: share of the distribution between the two ends.
        seed: of the draws.
    """
    numbers = _vector(values)
    size = len(numbers)
    if size**size <= MOST_ENUMERATED:
        indices = numpy.indices((size,) * size).reshape(size, -1)
    else:
        indices = numpy.random.default_rng(seed).integers(size, size=(size, MOST_ENUMERATED))
    means_R = numbers[indices].mean(axis=0)
    # The resamples are the distribution and no sample of it, so nothing is to be guessed between two of them.
    low, high = numpy.quantile(means_R, ((1 - level) / 2, (1 + level) / 2), method="inverted_cdf")
    return float(low), float(high)


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


def largest_coverage(num_seeds: int) -> float:
    """The most often that an interval within S values can hold the true mean: 1 - 2^(1-S), for symmetric errors."""
    return 1.0 - 2.0 ** (1 - num_seeds)


def _vector(values: ArrayLike) -> Values:
    numbers = numpy.asarray(values, dtype=numpy.float64)
    assert numbers.ndim == 1 and numbers.size, f"expected one number per seed, found shape {numbers.shape}"
    return numbers
