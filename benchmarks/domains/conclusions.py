"""Conclusions in words: sentences that follow from intervals and corrected p-values, whatever the results are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from das_ds.reporting.comparison import Comparison, Group
from das_ds.reporting.metrics import (
    FINAL_LOSS,
    FORGETTING,
    LOSS_AFTER_LEARNING_LATER,
    Metric,
    baseline_sweep,
    estimate_metric,
    forgetting_vs_matched_baseline,
    matched_baseline_forgetting,
    metric_difference,
)
from das_ds.reporting.statistics import Difference, holm

SIGNIFICANCE_LEVEL = 0.05
GOAL = 0.5
"""Largest fraction of the naive forgetting at equal learning that meets the goal."""


@dataclass(frozen=True)
class Aspect:
    """A metric in which two groups are compared, and its words."""

    metric: Metric
    subject: str
    less: str
    more: str


ASPECTS = (
    Aspect(FORGETTING, "forgetting", "less", "more"),
    Aspect(LOSS_AFTER_LEARNING_LATER, "loss after learning (2..T)", "lower", "higher"),
    Aspect(FINAL_LOSS, "final loss", "lower", "higher"),
)


def describe_difference(
    difference: Difference, corrected_p: float | None, less: str = "less", more: str = "more"
) -> str:
    """A difference in words.

    Args:
        difference: mean, interval and p-value.
        corrected_p: p-value corrected for its family of tests; None: it is in no family.
        less, more: words for a negative and a positive difference.
    """
    word = less if difference.mean < 0 else more
    if difference.low is None or difference.high is None:
        return f"{word}, based on a single seed"
    if difference.low <= 0 <= difference.high:
        return "no clear difference (the interval contains 0)"
    if corrected_p is None:
        return f"{word} (the interval excludes 0; not tested)"
    if corrected_p <= SIGNIFICANCE_LEVEL:
        return f"significantly {word} (p {corrected_p:.2g})"
    return f"{word}, but not significantly (the interval excludes 0; p {corrected_p:.2g})"


def compare_with_baseline(comparison: Comparison, group: Group, family: Sequence[str] = ()) -> str:
    """Compare a group with naive training at equal learning, in one sentence.

    Args:
        comparison: of all groups.
        group: to describe.
        family: labels of the groups chosen for this test in advance.
    """
    forgetting = estimate_metric(group, FORGETTING)
    if forgetting is None:
        return f"`{group.label}`: forgetting is undefined."
    difference = forgetting_vs_matched_baseline(comparison, group)
    baseline = matched_baseline_forgetting(comparison, group)
    if difference is None or baseline is None:
        return (
            f"`{group.label}` forgets {forgetting.mean:+.3f}; it learns more or less than every naive run, so it has "
            "no baseline at equal learning."
        )
    relative = relative_forgetting(comparison, group)
    percent = f" ({relative:.0%} of it)" if relative is not None and relative > 0 else ""
    words = describe_difference(difference, baseline_p_values(comparison, family).get(group.label))
    return (
        f"`{group.label}` forgets {forgetting.mean:+.3f}; naive training at equal learning forgets {baseline:+.3f}"
        f"{percent}: {words}."
    )


def relative_forgetting(comparison: Comparison, group: Group) -> float | None:
    """Forgetting as a fraction of the baseline's at equal learning; None if there is no (positive) baseline."""
    difference = forgetting_vs_matched_baseline(comparison, group)
    baseline = matched_baseline_forgetting(comparison, group)
    if difference is None or baseline is None or baseline <= 0:
        return None
    return (baseline + difference.mean) / baseline


def baseline_p_values(comparison: Comparison, family: Sequence[str]) -> dict[str, float]:
    """Label -> p-value of its difference from the matched baseline, corrected for the complete family.

    Members of the family that could not be tested still count as tests.
    """
    differences = {
        group.label: difference
        for group in comparison.groups
        if group.label in family
        and (difference := forgetting_vs_matched_baseline(comparison, group)) is not None
        and difference.low is not None
    }
    p_values = holm([difference.p_value for difference in differences.values()], len(family))
    return dict(zip(differences, p_values, strict=True))


def check_goal(comparison: Comparison, label: str) -> str:
    """Whether a group forgets at most half as much as naive training at equal learning, in one sentence."""
    goal = f"Goal for `{label}`, at most half of the naive forgetting at equal learning"
    relative = relative_forgetting(comparison, comparison.group(label))
    if relative is None:
        return f"{goal}: undecided, without a baseline at equal learning."
    relative = max(relative, 0.0)
    return f"{goal}: {'reached' if relative <= GOAL else 'not reached'} ({relative:.0%})."


def compare_pairs(comparison: Comparison, pairs: Sequence[tuple[str, str]], family: Sequence[str] = ()) -> list[str]:
    """Compare pairs of groups, paired by seed, in forgetting, loss after learning and final loss.

    Args:
        comparison: of all groups.
        pairs: labels; one sentence each.
        family: labels of the groups chosen for testing in advance. A pair of two of them is tested in every aspect, and
            p-values are corrected for all aspects of all such pairs.
    """
    differences = {
        (pair, aspect): difference
        for pair in pairs
        for aspect in ASPECTS
        if (difference := metric_difference(comparison.group(pair[0]), comparison.group(pair[1]), aspect.metric))
        is not None
    }
    tested = [
        key for key, difference in differences.items() if set(key[0]) <= set(family) and difference.low is not None
    ]
    num_tests = len(ASPECTS) * sum(set(pair) <= set(family) for pair in pairs)
    corrected = holm([differences[key].p_value for key in tested], num_tests)
    p_values = dict(zip(tested, corrected, strict=True))
    sentences = []
    for pair in pairs:
        parts = [
            _describe_aspect(aspect, differences.get((pair, aspect)), p_values.get((pair, aspect)))
            for aspect in ASPECTS
        ]
        sentences.append(f"`{pair[0]}` compared with `{pair[1]}`: {'; '.join(parts)}.")
    return sentences


def compared_groups(comparison: Comparison) -> list[Group]:
    """All groups outside the baseline sweep."""
    sweep = {group.label for group in baseline_sweep(comparison)}
    return [group for group in comparison.groups if group.label not in sweep]


def _describe_aspect(aspect: Aspect, difference: Difference | None, corrected_p: float | None) -> str:
    if difference is None:
        return f"{aspect.subject}: no common seed"
    words = describe_difference(difference, corrected_p, aspect.less, aspect.more)
    return f"{aspect.subject} {difference.mean:+.3f}, {words}"
