"""Scoring rules and transitions, by numbers written out and by simulated models that know or guess."""

from __future__ import annotations

import math

import numpy as np
import pytest

from das_ds.benchmark.rules import (
    RULES,
    ScoredChoice,
    Transitions,
    adjust_for_chance,
    bits_per_byte,
    choose,
    compare_items,
    length,
)
from das_ds.config import ScoringRule

CHOICES = (ScoredChoice(" déjà vu", 5, -10.0, False), ScoredChoice(" no", 1, -5.5, True))


@pytest.mark.parametrize(
    ("rule", "lengths"),
    [
        ("acc", (1, 1)),
        ("acc_norm", (7, 2)),
        ("acc_per_token", (5, 1)),
        ("acc_per_char", (8, 3)),
        ("acc_per_byte", (10, 3)),
    ],
)
def test_rule_divides_by_its_length(rule: ScoringRule, lengths: tuple[int, int]) -> None:
    assert tuple(length(rule, choice) for choice in CHOICES) == lengths
    scores = [choice.log_likelihood / n for choice, n in zip(CHOICES, lengths, strict=True)]
    assert choose(rule, CHOICES) == int(np.argmax(scores)) == (1 if rule == "acc" else 0)


def test_rules_are_all_tested_and_never_divide_by_zero() -> None:
    assert RULES == ("acc", "acc_norm", "acc_per_token", "acc_per_char", "acc_per_byte")
    assert [length(rule, ScoredChoice(" ", 1, -1.0, False)) for rule in RULES] == [1] * 5


def test_equal_choices_give_the_first() -> None:
    assert choose("acc", [ScoredChoice(" a", 1, -2.0, False)] * 3) == 0


def test_bits_per_byte_counts_space_and_utf_8() -> None:
    assert bits_per_byte(CHOICES[0]) == pytest.approx(10.0 / math.log(2) / 10)


@pytest.mark.parametrize(("accuracy", "expected"), [(0.25, 0.0), (1.0, 1.0), (0.0, -1 / 3), (0.625, 0.5)])
def test_adjust_for_chance(accuracy: float, expected: float) -> None:
    assert adjust_for_chance(accuracy, 0.25) == pytest.approx(expected)


def test_compare_items_counts_changes() -> None:
    found = compare_items("110010", "101010")
    assert found == Transitions(6, 1, 1, 0.5, 0.5)
    # g = (1/2) (1/2) (1/3)
    assert found.adjusted(1 / 3) == pytest.approx((1 / 6 - 1 / 12, 1 / 6 - 1 / 12))
    assert found.adjusted(0.0) == pytest.approx((1 / 6, 1 / 6))
    assert found.adjusted(1.0) == (0.0, 0.0)


@pytest.mark.parametrize("num_choices", [2, 4])
def test_adjusted_transitions_are_those_of_known_answers(num_choices: int) -> None:
    generator = np.random.default_rng(0)
    num_items = 200_000
    # Two models that know answers independently of each other, and guess the others.
    knows = [generator.random(num_items) < share for share in (0.6, 0.3)]
    right = [known | (generator.random(num_items) < 1 / num_choices) for known in knows]
    before, after = ("".join("1" if one else "0" for one in answers) for answers in right)
    found = compare_items(before, after).adjusted(1 / (num_choices - 1))
    expected = [(knows[first] & ~right[1 - first]).mean() for first in (0, 1)]
    assert found == pytest.approx(expected, abs=0.005)
    assert compare_items(before, after).right_to_wrong / num_items > expected[0] + 0.02
