"""The first screen: one table, five sentences that follow from it, and its limits."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from benchmarks.domains.evidence.families import (
    AGAINST_RIVALS,
    OURS,
    against_naive,
    describe_seeds,
    describe_untested,
)
from benchmarks.domains.evidence.goals import find_group
from benchmarks.domains.evidence.measures import (
    GENERAL_END,
    GENERAL_PEAK,
    MACRO_F1,
    compared_groups,
    describe_missing_share,
    forgetting_share,
    format_metric,
    format_ratio,
    format_share,
    format_share_of,
    relative_memory,
    relative_time,
)
from benchmarks.domains.plan import NAIVE, Tier
from benchmarks.domains.result_file import SuiteResult, TierResult
from benchmarks.domains.tiers import TIERS
from das_ds.reporting.comparison import Comparison, Group
from das_ds.reporting.metrics import FORGETTING, LOSS_AFTER_LEARNING_LATER, estimate_metric
from das_ds.reporting.tables import Row

FIRST_FORM = "directions, first form"
SHARE_TITLE = "of naive forgetting at equal learning"
README_COLUMNS = ("method", LOSS_AFTER_LEARNING_LATER.title, FORGETTING.title, SHARE_TITLE, GENERAL_END.title, "time")
MAX_NAMED = 3
"""Methods that a sentence names."""


def contenders_of(result: TierResult) -> tuple[str, ...]:
    """Groups that a tier was planned to run with all seeds, whatever their results."""
    return TIERS[result.tier].contenders if result.tier in TIERS else ()


def labels_in_print(result: TierResult, suite: SuiteResult) -> dict[str, str]:
    """Group -> its label with the strength that was chosen."""
    name = suite.base if suite.base in result.strengths else f"{suite.base}_{suite.steps_per_domain}"
    return result.strengths.get(name, {})


def headline_rows(
    comparison: Comparison,
    names: Mapping[str, str],
    tasks: Comparison | None = None,
    only: Collection[str] | None = None,
) -> list[Row]:
    """Learning, forgetting, general knowledge, end tasks and costs of every group but the naive sweep.

    Args:
        comparison: of all groups.
        names: group -> label in print, where it is another.
        tasks: with scores of end tasks; None: the column is left out.
        only: groups to show beside naive training; None: all.
    """
    header = [
        "method",
        "seeds",
        LOSS_AFTER_LEARNING_LATER.title,
        FORGETTING.title,
        SHARE_TITLE,
        GENERAL_PEAK.title,
        GENERAL_END.title,
        *([MACRO_F1.title] if tasks else []),
        "time",
        "memory",
    ]
    naive = comparison.group(comparison.reference)
    groups = [naive, *(group for group in compared_groups(comparison) if only is None or group.label in only)]
    rows = []
    for group in groups:
        scored = find_group(tasks, group.label)
        rows.append(
            [
                names.get(group.label, group.label),
                str(len(group.runs)),
                format_metric(group, LOSS_AFTER_LEARNING_LATER),
                format_metric(group, FORGETTING),
                "100%" if group is naive else format_share_of(comparison, group),
                format_metric(group, GENERAL_PEAK),
                format_metric(group, GENERAL_END),
                *([format_metric(scored, MACRO_F1, digits=1) if scored else "-"] if tasks else []),
                format_ratio(relative_time(comparison, group)),
                format_ratio(relative_memory(comparison, group)),
            ]
        )
    return [header, *rows]


def select_columns(rows: Sequence[Row], titles: Sequence[str]) -> list[Row]:
    """The columns with these titles, where the table has them."""
    indices = [rows[0].index(title) for title in titles if title in rows[0]]
    return [[row[index] for index in indices] for row in rows]


def our_group(comparison: Comparison) -> Group | None:
    """The method as shipped or, in older results, its first form."""
    return find_group(comparison, OURS) or find_group(comparison, FIRST_FORM)


def sentences(result: TierResult, suite: SuiteResult) -> list[str]:
    """What the table says: setting, least forgetting, our method, its rivals, its costs."""
    comparison = suite.comparison
    ours = our_group(comparison)
    found = [_describe_setting(result, suite), _describe_least_forgetting(comparison)]
    if ours is None:
        return [*found, f"`{OURS}` was not run yet."]
    return [
        *found,
        _describe_ours(comparison, ours, TIERS.get(result.tier)),
        _describe_rivals(comparison, ours),
        _describe_costs(comparison, ours),
    ]


def _describe_setting(result: TierResult, suite: SuiteResult) -> str:
    batch = result.settings["train"]["global_batch_size"]
    length = result.settings["data"]["sequence_length"]
    domains = suite.comparison.domains
    seeds = describe_seeds(len(group.runs) for group in suite.comparison.groups)
    return (
        f"{_article(suite.base)} learns {len(domains)} domains in sequence ({', '.join(domains)}), each in "
        f"{suite.steps_per_domain} steps of {batch} x {length} tokens, with {seeds} per method on "
        f"{result.environment['device']}."
    )


def _article(base: str) -> str:
    return f"{'An' if base[0] in 'aeiou' else 'A'} {base}"


def _describe_least_forgetting(comparison: Comparison) -> str:
    naive = estimate_metric(comparison.group(comparison.reference), FORGETTING)
    shares = {
        group.label: share
        for group in compared_groups(comparison)
        if (share := forgetting_share(comparison, group)) is not None
    }
    assert naive is not None, "naive training has an order of domains"
    first = f"Naive training (`{NAIVE}`) forgets {naive.mean:+.3f} nats"
    if not shares:
        return f"{first}; no other method has a naive baseline at equal learning."
    least = sorted(shares, key=lambda label: shares[label].mean)[:MAX_NAMED]
    named = ", ".join(f"`{label}` ({format_share(shares[label])})" for label in least)
    return (
        f"{first}; of {len(shares)} methods that can be compared at equal learning, the least of it is left by {named}."
    )


def _describe_ours(comparison: Comparison, ours: Group, tier: Tier | None) -> str:
    share = forgetting_share(comparison, ours)
    if share is None:
        return f"`{ours.label}` {describe_missing_share(comparison, ours)}, so it has no baseline at equal learning."
    test = against_naive(tier.against_naive if tier else ()).run(comparison).get(ours.label)
    outcome = "not among the planned tests" if test is None else test.describe()
    what = "nothing" if share.mean <= 0 else f"{format_share(share)} of what naive training forgets"
    return f"`{ours.label}` forgets {what} at equal learning: {outcome}."


def _describe_rivals(comparison: Comparison, ours: Group) -> str:
    own = forgetting_share(comparison, ours)
    others = {
        group.label: share
        for group in compared_groups(comparison)
        if group.method != ours.method and (share := forgetting_share(comparison, group)) is not None
    }
    if own is None or not others:
        return "It cannot be compared with other methods at equal learning."
    worse = [label for label, share in others.items() if share.mean > own.mean]
    text = f"It leaves a smaller share than {len(worse)} of the {len(others)} other methods"
    if len(worse) < len(others):
        better = [f"`{label}`" for label in others if label not in worse]
        text += f" (not than {', '.join(better)})"
    return f"{text}; {_describe_rival_tests(comparison, ours)}."


def _describe_rival_tests(comparison: Comparison, ours: Group) -> str:
    """Outcome of the tests of the method as shipped; no others were planned."""
    if ours.label != OURS:
        return "these comparisons are not among the planned tests"
    tests = AGAINST_RIVALS.run(comparison).values()
    if all(test.p_value is None for test in tests):
        return describe_untested(max(test.num_seeds for test in tests))
    beaten = ", ".join(f"`{test.label}`" for test in tests if test.is_less)
    return f"significantly, after correction: {beaten or 'none'}"


def _describe_costs(comparison: Comparison, ours: Group) -> str:
    naive = comparison.group(comparison.reference)
    return (
        f"It takes {format_ratio(relative_time(comparison, ours))} times the time and "
        f"{format_ratio(relative_memory(comparison, ours))} times the memory of naive training, and the loss on "
        f"general text rises by {format_metric(ours, GENERAL_PEAK)} at most and {format_metric(ours, GENERAL_END)} "
        f"at the end (naive: {format_metric(naive, GENERAL_PEAK)} and {format_metric(naive, GENERAL_END)})."
    )


def explain_first_form(comparison: Comparison, link: str) -> list[str]:
    """What the first form is, where the method as shipped was not run.

    Args:
        comparison: of all groups.
        link: to the page of the method.
    """
    ours = our_group(comparison)
    if ours is None or ours.label != FIRST_FORM:
        return []
    return [
        f"`{FIRST_FORM}` is an [earlier form]({link}#which-form-the-search), a mask of updates alone with c = 3; the "
        f"method as shipped (`{OURS}`) was not run here yet."
    ]


def limits(results: Sequence[TierResult], suite: SuiteResult) -> list[str]:
    """What these results do not show, one sentence each."""
    comparison = suite.comparison
    found = explain_first_form(comparison, "../methods/directions.md")
    missing = [f"`{name}`" for name in TIERS if name not in {result.tier for result in results}]
    if missing:
        found.append(f"Not run yet: {'tier' if len(missing) == 1 else 'tiers'} {', '.join(missing)}.")
    if without := _without_share(comparison):
        found.append(f"No naive baseline at equal learning: {'; '.join(without)}.")
    return [*found, *FIXED_LIMITS]


def _without_share(comparison: Comparison) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for group in compared_groups(comparison):
        if forgetting_share(comparison, group) is None:
            reasons.setdefault(describe_missing_share(comparison, group), []).append(f"`{group.label}`")
    return [f"{', '.join(labels)} ({reason})" for reason, labels in reasons.items()]


FIXED_LIMITS = (
    "The models are small and the texts short; whether the order of methods is the same at 1 B weights is not known.",
    "Between two naive learning rates the line is a little above the curve, so that every share is a little too small.",
    "Times are wall times of runs that share a machine.",
)
