"""What a comparison shows, in words: sentences that follow from intervals, whatever they turn out to be."""

from __future__ import annotations

from das_ds.evaluation.comparison import Comparison, Group
from das_ds.evaluation.measures import (
    FINAL,
    FORGETTING,
    LEARNED,
    Measure,
    difference_of,
    estimate_of,
    line_forgetting,
    line_groups,
    off_line,
)
from das_ds.functional.intervals import Difference

SIGNIFICANT = 0.05
GOAL = 0.5
"""Share of the forgetting of naive training, at equal learning, that das is to forget at most."""


def judged(found: Difference, less: str = "less", more: str = "more") -> str:
    """A difference as words: significant, the same in every seed, or neither."""
    word = less if found.mean < 0 else more
    if found.low is None or found.high is None:
        return f"{word} in the one seed there is"
    if not (found.low > 0 or found.high < 0):
        return "not told apart: the interval holds 0"
    if found.p_value <= SIGNIFICANT:
        return f"significantly {word} (p {found.p_value:.2g})"
    return (
        f"{word}, the interval leaves out 0, but {found.num_seeds} seeds cannot be significant (p {found.p_value:.2g})"
    )


def against_line(comparison: Comparison, group: Group) -> str:
    """A group beside naive training that learns as much."""
    forgets = estimate_of(group, FORGETTING)
    if forgets is None:
        return f"`{group.label}`: forgetting is not defined for it."
    own, found, line = f"`{group.label}` forgets {forgets.mean:+.3f}", *_line(comparison, group)
    if found is None or line is None:
        return f"{own}; no naive run learns as much or as little as it does, so the two cannot be held together."
    share = f", {(line + found.mean) / line:.0%} of it" if line > 0 and line + found.mean > 0 else ""
    return f"{own}; naive training that learns as much forgets {line:+.3f}{share}: {judged(found)}."


def goal(comparison: Comparison, label: str) -> str:
    """Whether a group forgets at most half of what naive training does at equal learning."""
    found, line = _line(comparison, comparison.group(label))
    if found is None or line is None or line <= 0:
        return f"Half of naive forgetting at equal learning, `{label}`: cannot be said."
    share = max(line + found.mean, 0.0) / line
    reached = "reached" if share <= GOAL else "not reached"
    return f"Half of naive forgetting at equal learning, `{label}`: {reached} ({share:.0%})."


def between(comparison: Comparison, label: str, other: str) -> str:
    """Two groups beside each other, seed by seed, in what they forget, what they learn, and what is left of both."""
    these, others = comparison.group(label), comparison.group(other)
    forgets = _part(these, others, FORGETTING, "forgets", "less", "more")
    learns = _part(these, others, LEARNED, "its loss when learned is", "lower", "higher")
    ends = _part(these, others, FINAL, "its loss at the end is", "lower", "higher")
    return f"`{label}` beside `{other}`: {forgets}; {learns}; {ends}."


def compared_groups(comparison: Comparison) -> list[Group]:
    """All groups but the reference and its line."""
    line = {group.label for group in line_groups(comparison)}
    return [group for group in comparison.groups if group.label not in line]


def _line(comparison: Comparison, group: Group) -> tuple[Difference | None, float | None]:
    return off_line(comparison, group), line_forgetting(comparison, group)


def _part(these: Group, others: Group, measure: Measure, verb: str, less: str, more: str) -> str:
    found = difference_of(these, others, measure)
    return f"{verb}: no seed in common" if found is None else f"{verb} {found.mean:+.3f}, {judged(found, less, more)}"
