"""Goals of the method, and whether the results hold them: `held`, `not held`, or why that cannot be said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.domains.evidence.families import (
    AGAINST_RIVALS,
    ON_END_TASKS,
    ON_GENERAL_TEXT,
    OURS,
    OURS_WITH_REPLAY,
    REPLAY,
    RIVALS,
    WITH_REPLAY,
    Test,
    describe_untested,
)
from benchmarks.domains.evidence.measures import (
    GENERAL_END,
    GENERAL_PEAK,
    MACRO_F1,
    compared_groups,
    forgetting_share,
    format_share,
)
from benchmarks.domains.plan import NAIVE
from das_ds.reporting.comparison import Comparison, Group
from das_ds.reporting.metrics import Metric, estimate_metric, metric_difference

GOAL_TIER = "cpu"
"""Tier whose first suite decides."""
LARGEST_SHARE = 0.15
NUM_DOMAINS = 6
SMALLEST_GAIN = 1.3
"""Points of macro-F1."""
NOT_RIVALS = ("pool", "replay", "derpp")
"""Methods that see text of earlier or later domains beside the present one's."""
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Goal:
    """A goal and its outcome."""

    text: str
    outcome: str
    """`held`, `not held`, `not measured`, or `not tested` with the number of seeds."""
    values: str
    """What the outcome follows from."""

    def describe(self) -> str:
        """One bullet."""
        values = f" {self.values}" if self.values else ""
        return f"- **{self.outcome}**: {self.text}.{values}"


def check_goals(comparison: Comparison | None, tasks: Comparison | None) -> list[Goal]:
    """All goals, each from the results.

    Args:
        comparison: of the tier that decides; None: it was not run yet.
        tasks: with scores of end tasks; None: there are none yet.
    """
    return [
        _share_goal(comparison),
        _rivals_goal(comparison),
        _replay_goal(comparison),
        _tasks_goal(tasks),
        _general_goal(comparison),
    ]


def _share_goal(comparison: Comparison | None) -> Goal:
    text = (
        f"over {NUM_DOMAINS} domains `{OURS}` forgets at most {LARGEST_SHARE:.0%} of what naive training forgets at "
        "equal learning"
    )
    group = find_group(comparison, OURS)
    if comparison is None or group is None or len(comparison.domains) != NUM_DOMAINS:
        return Goal(text, NOT_MEASURED, "")
    share = forgetting_share(comparison, group)
    if share is None:
        return Goal(text, NOT_MEASURED, "It has no naive baseline at equal learning.")
    values = f"It forgets {format_share(share)}"
    interval = share.estimate
    if interval is not None and interval.low is not None:
        values += f" (95 % interval of the seeds' shares: {interval.low:.0%} to {interval.high:.0%})"
    return Goal(text, _outcome(share.mean <= LARGEST_SHARE), values + f", {_seeds(group)}.")


def _rivals_goal(comparison: Comparison | None) -> Goal:
    text = f"`{OURS}` forgets less than {_names(RIVALS)} at equal learning, each significantly after correction"
    if comparison is None or find_group(comparison, OURS) is None:
        return Goal(text, NOT_MEASURED, "")
    tests = list(AGAINST_RIVALS.run(comparison).values())
    words = [f"`{test.label}`: {AGAINST_RIVALS.describe(test)}" for test in tests]
    return Goal(text, _tested_outcome(tests), f"Share minus that of {'; '.join(words)}.")


def _replay_goal(comparison: Comparison | None) -> Goal:
    text = f"`{OURS_WITH_REPLAY}` ends at a lower loss than `{REPLAY}` alone, with the same fraction replayed"
    if find_group(comparison, OURS_WITH_REPLAY) is None or find_group(comparison, REPLAY) is None:
        return Goal(text, NOT_MEASURED, "")
    assert comparison is not None, "it has these groups"
    tests = list(WITH_REPLAY.run(comparison).values())
    return Goal(text, _tested_outcome(tests), f"Difference: {WITH_REPLAY.describe(tests[0])}.")


def _tasks_goal(comparison: Comparison | None) -> Goal:
    text = (
        f"fine-tuned on the end tasks, the last model of `{OURS}` scores at least {SMALLEST_GAIN} points of mean "
        f"macro-F1 above that of `{NAIVE}`"
    )
    group = find_group(comparison, OURS)
    naive = find_group(comparison, NAIVE)
    if comparison is None or group is None or naive is None:
        return Goal(text, NOT_MEASURED, "")
    difference = metric_difference(group, naive, MACRO_F1)
    if difference is None:
        return Goal(text, NOT_MEASURED, "")
    test = ON_END_TASKS.run(comparison)[NAIVE]
    values = f"Difference: {ON_END_TASKS.describe(test)}."
    return Goal(text, _outcome(difference.mean >= SMALLEST_GAIN), values)


def _general_goal(comparison: Comparison | None) -> Goal:
    text = (
        f"with `{OURS}` the loss on general text rises less than with any other method without replay, at most during "
        "the run and at its end"
    )
    group = find_group(comparison, OURS)
    if comparison is None or group is None:
        return Goal(text, NOT_MEASURED, "")
    rivals = [
        other for other in compared_groups(comparison) if other.method != group.method and not _replays(other.label)
    ]
    parts = [_compare_drift(group, rivals, metric) for metric in (GENERAL_PEAK, GENERAL_END)]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return Goal(text, NOT_MEASURED, "")
    tests = ON_GENERAL_TEXT.run(comparison).values()
    words = "; ".join(f"`{test.label}`: {ON_GENERAL_TEXT.describe(test)}" for test in tests)
    values = f"{' '.join(sentence for _, sentence in known)} At the end, compared with {words}."
    return Goal(text, _outcome(all(is_lowest for is_lowest, _ in known)), values)


def _compare_drift(group: Group, rivals: Sequence[Group], metric: Metric) -> tuple[bool, str] | None:
    """Whether a group has the smallest mean, and who else does."""
    ours = estimate_metric(group, metric)
    means = {other.label: found.mean for other in rivals if (found := estimate_metric(other, metric)) is not None}
    if ours is None or not means:
        return None
    smaller = sorted((label for label, mean in means.items() if mean <= ours.mean), key=means.__getitem__)
    nearest = min(means, key=means.__getitem__)
    next_best = f"the least; next is `{nearest}` with {means[nearest]:+.3f}"
    others = f"not less than {_names(smaller)}" if smaller else next_best
    return not smaller, f"{metric.title.capitalize()}: {ours.mean:+.3f}, {others}."


def find_group(comparison: Comparison | None, label: str) -> Group | None:
    """The group with this label, if any."""
    groups = comparison.groups if comparison else []
    return next((group for group in groups if group.label == label), None)


def _replays(label: str) -> bool:
    return label in NOT_RIVALS or label.endswith(", replay")


def _tested_outcome(tests: Sequence[Test]) -> str:
    """Held if all differences are significantly negative."""
    untested = [test for test in tests if test.p_value is None]
    if any(test.p_value is not None and not test.is_less for test in tests):
        return "not held"
    return describe_untested(min(test.num_seeds for test in untested)) if untested else "held"


def _outcome(is_held: bool) -> str:
    return "held" if is_held else "not held"


def _seeds(group: Group) -> str:
    return f"{len(group.runs)} {'seed' if len(group.runs) == 1 else 'seeds'}"


def _names(labels: Sequence[str]) -> str:
    quoted = [f"`{label}`" for label in labels]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"
