"""Scoring rules of multiple choice, and what changed item by item between two models.

Shape legend: K choices of an item, n items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from das_ds.config import ScoringRule

RULES: tuple[ScoringRule, ...] = get_args(ScoringRule)


@dataclass(frozen=True, slots=True)
class ScoredChoice:
    """A choice and its probability."""

    text: str
    """As it follows its context."""
    num_tokens: int
    log_likelihood: float
    """Sum over its tokens, in nats."""
    is_greedy: bool
    """Whether each of its tokens is the most probable one at its position."""


def length(rule: ScoringRule, choice: ScoredChoice) -> int:
    """What a rule divides a choice's log-likelihood by.

    | rule | length |
    |---|---|
    | `acc` | 1 |
    | `acc_norm` | characters without the space in front, as in lm-evaluation-harness |
    | `acc_per_token` | tokens |
    | `acc_per_char` | characters, the space in front included, as in OLMES (Gu et al., 2024, section 3.2) |
    | `acc_per_byte` | bytes in UTF-8, the space in front included |

    Returns:
        At least 1.
    """
    match rule:
        case "acc":
            return 1
        case "acc_norm":
            return max(len(choice.text.removeprefix(" ")), 1)
        case "acc_per_token":
            return max(choice.num_tokens, 1)
        case "acc_per_char":
            return max(len(choice.text), 1)
        case "acc_per_byte":
            return max(_num_bytes(choice.text), 1)


def choose(rule: ScoringRule, choices: Sequence[ScoredChoice]) -> int:
    """Position of the choice with the highest log-likelihood per length; the first of equal ones."""
    scores = [choice.log_likelihood / length(rule, choice) for choice in choices]
    return scores.index(max(scores))


def bits_per_byte(choice: ScoredChoice) -> float:
    """-log2 p / bytes; the bytes include the space in front."""
    return -choice.log_likelihood / math.log(2) / max(_num_bytes(choice.text), 1)


def adjust_for_chance(accuracy: float, chance: float) -> float:
    """(accuracy - chance) / (1 - chance): 0 for guessing, 1 for all right."""
    return (accuracy - chance) / (1.0 - chance)


@dataclass(frozen=True)
class Transitions:
    """Items that changed between two models (Harmon et al., *Mapping Post-Training Forgetting in Language Models at
    Scale*, arXiv 2510.17776)."""

    num_items: int
    right_to_wrong: int
    wrong_to_right: int
    accuracy_before: float
    accuracy_after: float

    def adjusted(self, guessing: float) -> tuple[float, float]:
        """Forgetting and backward transfer as fractions of all items, without what guessing explains.

            max(0, N(1 -> 0) / n - g),  max(0, N(0 -> 1) / n - g),  g = (1 - a) (1 - a') / (K - 1)

        for accuracies a and a'. A model that knows an item's answer or guesses among K choices guesses
        (1 - a) / (K - 1) of all items right, of which 1 - a' are wrong in the other model if both know answers
        independently of each other. Models of one run do not, so that less is taken away than guessing explains.

        Args:
            guessing: mean of 1 / (K - 1) over the items; 0 for a cloze.
        """
        by_chance = guessing * (1.0 - self.accuracy_before) * (1.0 - self.accuracy_after)
        forgetting = max(0.0, self.right_to_wrong / self.num_items - by_chance)
        return forgetting, max(0.0, self.wrong_to_right / self.num_items - by_chance)


def compare_items(before: str, after: str) -> Transitions:
    """Which items changed.

    Args:
        before, after: a digit per item, 1 where the model is right; of the same n items.
    """
    pairs = list(zip(before, after, strict=True))
    return Transitions(
        num_items=len(pairs),
        right_to_wrong=pairs.count(("1", "0")),
        wrong_to_right=pairs.count(("0", "1")),
        accuracy_before=before.count("1") / len(pairs),
        accuracy_after=after.count("1") / len(pairs),
    )


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8"))
