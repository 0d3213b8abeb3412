"""Weighted round robin: as the definition says turn by turn, in proportion in every window, and plain if equal."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from das_ds.functional.round_robin import WeightedRoundRobin

WEIGHTS = [(1,), (1, 1), (1, 1, 1), (7, 3), (1, 99), (5, 3, 2), (97, 2, 1), (1, 1, 6), (13, 7, 5, 3, 3, 2, 1)]


def chairman_assignment(weights: tuple[int, ...], num_turns: int) -> list[int]:
    """Tijdeman's rule in fractions: among those that are due by 1/m, the one that has to come first."""
    total = sum(weights)
    parts = [Fraction(weight, total) for weight in weights]
    slack = Fraction(1, max(2 * len(weights) - 2, 1))
    counts = [0] * len(weights)
    turns = []
    for turn in range(1, num_turns + 1):
        behind = [part * turn - count for part, count in zip(parts, counts, strict=True)]
        due = [source for source in range(len(weights)) if behind[source] >= slack]
        chosen = min(due, key=lambda source: ((1 - slack - behind[source]) / parts[source], source))
        counts[chosen] += 1
        turns.append(chosen)
    return turns


@pytest.mark.parametrize("weights", WEIGHTS)
def test_turns_are_those_of_the_definition(weights: tuple[int, ...]) -> None:
    """Over three periods; numbers of samples and counts follow from counting."""
    turns = WeightedRoundRobin(weights)
    expected = chairman_assignment(weights, 3 * sum(weights))
    seen = Counter[int]()
    for number, source in enumerate(expected):
        assert turns.counts(number) == [seen[i] for i in range(len(weights))]
        assert turns[number] == (source, seen[source])
        seen[source] += 1


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_window_has_its_proportions(weights: tuple[int, ...]) -> None:
    turns = WeightedRoundRobin(weights)
    total = sum(weights)
    sources = np.array([turns[number][0] for number in range(2 * total)])
    bound = 0 if len(weights) == 1 else 1 - 1 / (2 * len(weights) - 2)
    for source, weight in enumerate(weights):
        counts = np.concatenate(([0], np.cumsum(sources == source)))
        ahead = counts - np.arange(2 * total + 1) * weight / total
        assert np.abs(ahead).max() <= bound + 1e-9
        # Of any consecutive samples the difference of two of these, hence less than two.
        assert np.ptp(ahead) < 2 and counts[total] == weight


def test_equal_weights_are_round_robin_and_common_divisors_do_not_matter() -> None:
    assert [WeightedRoundRobin((4, 4, 4))[number] for number in range(7)] == [
        *((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 2))
    ]
    found, expected = (WeightedRoundRobin(weights) for weights in ((70, 30), (7, 3)))
    assert [found[number] for number in range(25)] == [expected[number] for number in range(25)]


def test_position_does_not_depend_on_earlier_calls() -> None:
    number = 10**15 + 7
    source, before = WeightedRoundRobin((7, 3))[number]
    periods, position = divmod(number, 10)
    expected, earlier = WeightedRoundRobin((7, 3))[position]
    assert (source, before) == (expected, periods * (7, 3)[source] + earlier)


@pytest.mark.parametrize("weights", [(7, 3), (97, 2, 1), (1, 1, 6)])
@pytest.mark.parametrize("sizes", [(5, 40, 8), (1, 1, 1), (100, 3, 50)])
def test_capped_counts_pass_over_exhausted_sources(weights: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    sizes = sizes[: len(weights)]
    turns = WeightedRoundRobin(weights)
    expected = [0] * len(weights)
    number = 0
    for wanted in range(sum(sizes) + 1):
        assert turns.capped_counts(wanted, sizes) == expected, wanted
        while wanted < sum(sizes):
            source, _ = turns[number]
            number += 1
            if expected[source] < sizes[source]:
                expected[source] += 1
                break
