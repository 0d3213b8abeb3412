"""What a comparison shows, in words: sentences that follow from intervals and corrected p-values, whatever they are."""

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

SIGNIFICANT = 0.05
GOAL = 0.5
"""Share of the forgetting of naive training, at equal learning, that das is to forget at most."""


@dataclass(frozen=True)
class Aspect:
    """What two groups are held beside each other in."""

    metric: Metric
    verb: str
    less: str
    more: str


ASPECTS = (
    Aspect(FORGETTING, "forgets", "less", "more"),
    Aspect(LOSS_AFTER_LEARNING_LATER, "its loss when learned (2..T) is", "lower", "higher"),
    Aspect(FINAL_LOSS, "its loss at the end is", "lower", "higher"),
)


def judged(found: Difference, corrected_p: float | None, less: str = "less", more: str = "more") -> str:
    """A difference as words.

    Args:
        found: the difference.
        corrected_p: its p-value, corrected for the family that it was tested in; None: it is in no family.
        less, more: what it is below and above 0.
    """
    word = less if found.mean < 0 else more
    if found.low is None or found.high is None:
        return f"{word} in the one seed there is"
    if found.low <= 0 <= found.high:
        return "not told apart: the interval holds 0"
    if corrected_p is None:
        return f"{word}, the interval leaves out 0; not tested"
    if corrected_p <= SIGNIFICANT:
        return f"significantly {word} (p {corrected_p:.2g})"
    return f"{word}, the interval leaves out 0 (p {corrected_p:.2g})"


def compare_with_baseline(comparison: Comparison, group: Group, family: Sequence[str] = ()) -> str:
    """A group beside naive training that learns as much.

    Args:
        comparison: of all groups.
        group: to speak of.
        family: labels of the groups that were to be tested against the line.
    """
    forgets = estimate_metric(group, FORGETTING)
    if forgets is None:
        return f"`{group.label}`: forgetting is not defined for it."
    own, found, line = f"`{group.label}` forgets {forgets.mean:+.3f}", *_line(comparison, group)
    if found is None or line is None:
        return f"{own}; no naive run learns as much or as little as it does, so the two cannot be held together."
    share = f", {(line + found.mean) / line:.0%} of it" if line > 0 and line + found.mean > 0 else ""
    words = judged(found, baseline_p_values(comparison, family).get(group.label))
    return f"{own}; naive training that learns as much forgets {line:+.3f}{share}: {words}."


def baseline_p_values(comparison: Comparison, family: Sequence[str]) -> dict[str, float]:
    """Label -> p-value of its difference from the line, corrected for the whole family, also for those without one."""
    found = {
        group.label: difference
        for group in comparison.groups
        if group.label in family
        and (difference := forgetting_vs_matched_baseline(comparison, group)) is not None
        and difference.low is not None
    }
    p_values = holm([difference.p_value for difference in found.values()], len(family))
    return dict(zip(found, p_values, strict=True))


def goal(comparison: Comparison, label: str) -> str:
    """Whether a group forgets at most half of what naive training does at equal learning."""
    found, line = _line(comparison, comparison.group(label))
    if found is None or line is None or line <= 0:
        return f"Half of naive forgetting at equal learning, `{label}`: cannot be said."
    share = max(line + found.mean, 0.0) / line
    reached = "reached" if share <= GOAL else "not reached"
    return f"Half of naive forgetting at equal learning, `{label}`: {reached} ({share:.0%})."


def between(comparison: Comparison, pairs: Sequence[tuple[str, str]], family: Sequence[str] = ()) -> list[str]:
    """Two groups beside each other, seed by seed: what they forget, what they learn, and what is left of both.

    Args:
        comparison: of all groups.
        pairs: labels; a sentence each.
        family: labels of the groups that were to be tested. A pair of two of them is tested in every aspect, and
            p-values are corrected for all aspects of all those pairs.
    """
    found = {
        (pair, aspect): difference
        for pair in pairs
        for aspect in ASPECTS
        if (difference := metric_difference(comparison.group(pair[0]), comparison.group(pair[1]), aspect.metric))
        is not None
    }
    tested = [key for key, difference in found.items() if set(key[0]) <= set(family) and difference.low is not None]
    num_tests = len(ASPECTS) * sum(set(pair) <= set(family) for pair in pairs)
    p_values = dict(zip(tested, holm([found[key].p_value for key in tested], num_tests), strict=True))
    sentences = []
    for pair in pairs:
        parts = [_part(aspect, found.get((pair, aspect)), p_values.get((pair, aspect))) for aspect in ASPECTS]
        sentences.append(f"`{pair[0]}` beside `{pair[1]}`: {'; '.join(parts)}.")
    return sentences


def compared_groups(comparison: Comparison) -> list[Group]:
    """All groups but the reference and its line."""
    line = {group.label for group in baseline_sweep(comparison)}
    return [group for group in comparison.groups if group.label not in line]


def _line(comparison: Comparison, group: Group) -> tuple[Difference | None, float | None]:
    return forgetting_vs_matched_baseline(comparison, group), matched_baseline_forgetting(comparison, group)


def _part(aspect: Aspect, found: Difference | None, corrected_p: float | None) -> str:
    if found is None:
        return f"{aspect.verb}: no seed in common"
    return f"{aspect.verb} {found.mean:+.3f}, {judged(found, corrected_p, aspect.less, aspect.more)}"
