"""Families of tests, named before their results are looked at, each with Holm's correction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.domains.evidence.measures import GENERAL_END, MACRO_F1, forgetting_share
from benchmarks.domains.plan import NAIVE, Tier
from das_ds.reporting.comparison import Comparison
from das_ds.reporting.comparison_report import MIN_SIGNIFICANT_PAIRS
from das_ds.reporting.metrics import FINAL_LOSS, Metric, forgetting_vs_matched_baseline, metric_difference
from das_ds.reporting.statistics import Difference, holm, paired_difference

SIGNIFICANCE_LEVEL = 0.05
OURS = "directions"
OURS_WITH_REPLAY = "directions, replay"
REPLAY = "replay"
RIVALS = ("osft", "ewc", "kd", "first moment")
"""What the method is tested against: the strongest ones that keep no earlier text."""


@dataclass(frozen=True)
class Test:
    """One test of a family."""

    label: str
    """What is compared."""
    difference: Difference | None
    """Paired by seed; None where there is nothing to compare."""
    p_value: float | None
    """Corrected for the complete family; None: not tested."""

    @property
    def is_significant(self) -> bool:
        """Whether the difference is more than chance."""
        return self.p_value is not None and self.p_value <= SIGNIFICANCE_LEVEL

    @property
    def is_less(self) -> bool:
        """Whether the difference is negative, and more than chance."""
        return self.is_significant and self.difference is not None and self.difference.mean < 0

    @property
    def num_seeds(self) -> int:
        """Pairs that count."""
        return 0 if self.difference is None else self.difference.num_seeds

    def describe(self) -> str:
        """The outcome in words."""
        if self.difference is None or self.p_value is None:
            return describe_untested(self.num_seeds)
        word = "less" if self.difference.mean < 0 else "more"
        outcome = "significantly " if self.is_significant else "not significantly "
        return f"{outcome}{word} (p {self.p_value:.2g}, {self.num_seeds} seeds)"


@dataclass(frozen=True)
class Family:
    """Tests that were planned together."""

    title: str
    """What is tested."""
    subject: str | None
    """Group that is compared with the others; None: each is compared with naive training."""
    unit: str
    """Of the differences."""
    labels: tuple[str, ...]
    """All planned tests, whether or not they can be made."""
    compare: Callable[[Comparison, str], Difference | None]
    """The difference of one test."""
    scale: float = 1.0
    """Factor of differences in print."""
    digits: int = 3
    """Decimal places there."""

    def run(self, comparison: Comparison) -> dict[str, Test]:
        """Label -> test; a test that cannot be made counts in the correction of all others."""
        present = {group.label for group in comparison.groups}
        differences = {label: self.compare(comparison, label) if label in present else None for label in self.labels}
        tested = [
            label
            for label, difference in differences.items()
            if difference is not None and difference.num_seeds >= MIN_SIGNIFICANT_PAIRS
        ]
        p_values = [difference.p_value for label in tested if (difference := differences[label]) is not None]
        corrected = dict(zip(tested, holm(p_values, len(self.labels)), strict=True))
        return {label: Test(label, difference, corrected.get(label)) for label, difference in differences.items()}

    def describe(self, test: Test) -> str:
        """A difference with its unit, and the outcome of its test."""
        if test.difference is None:
            return f"nothing to compare ({test.describe()})"
        return f"{self.scale * test.difference.mean:+.{self.digits}f} {self.unit}, {test.describe()}"


def families(tier: Tier | None) -> list[Family]:
    """All families of a tier; none of a tier that is no longer there, or that has no contenders."""
    if tier is None:
        return []
    paired = [family for family in PAIRED if {family.subject, *family.labels} <= set(tier.contenders)]
    return [against_naive(tier.against_naive), *paired] if tier.against_naive else paired


def against_naive(labels: Sequence[str]) -> Family:
    """Each of some groups compared with naive training."""
    return Family(
        f"forgetting compared with naive training (`{NAIVE}`) at equal learning",
        None,
        "nats",
        tuple(labels),
        lambda comparison, label: forgetting_vs_matched_baseline(comparison, comparison.group(label)),
    )


def describe_untested(num_seeds: int) -> str:
    """Why there is no p-value."""
    return f"not tested: {num_seeds} {'seed' if num_seeds == 1 else 'seeds'}"


def describe_seeds(counts: Iterable[int]) -> str:
    """Numbers of seeds, such as `2 to 8 seeds`."""
    known = sorted(set(counts))
    if known == [1]:
        return "1 seed"
    return f"{known[0]} seeds" if len(known) == 1 else f"{known[0]} to {known[-1]} seeds"


def _share_difference(comparison: Comparison, label: str) -> Difference | None:
    """Share of the naive forgetting of the method, minus that of a rival, over common seeds."""
    if not _has(comparison, OURS):
        return None
    ours = forgetting_share(comparison, comparison.group(OURS))
    other = forgetting_share(comparison, comparison.group(label))
    seeds = sorted(ours.by_seed.keys() & other.by_seed.keys()) if ours and other else []
    if ours is None or other is None or not seeds:
        return None
    return paired_difference([ours.by_seed[seed] for seed in seeds], [other.by_seed[seed] for seed in seeds])


def _difference_from(label: str, metric: Metric) -> Callable[[Comparison, str], Difference | None]:
    """A metric of one group minus that of another."""

    def compare(comparison: Comparison, other: str) -> Difference | None:
        if not _has(comparison, label):
            return None
        return metric_difference(comparison.group(label), comparison.group(other), metric)

    return compare


def _has(comparison: Comparison, label: str) -> bool:
    return any(group.label == label for group in comparison.groups)


AGAINST_RIVALS = Family(
    f"share of the naive forgetting at equal learning, `{OURS}` compared with each rival",
    OURS,
    "percentage points",
    RIVALS,
    _share_difference,
    scale=100.0,
    digits=1,
)
WITH_REPLAY = Family(
    f"final loss, `{OURS_WITH_REPLAY}` compared with replay alone",
    OURS_WITH_REPLAY,
    "nats",
    (REPLAY,),
    _difference_from(OURS_WITH_REPLAY, FINAL_LOSS),
)
ON_GENERAL_TEXT = Family(
    f"rise of the general loss by the end, `{OURS}` compared with each rival",
    OURS,
    "nats",
    RIVALS,
    _difference_from(OURS, GENERAL_END),
)
ON_END_TASKS = Family(
    f"mean macro-F1 of the end tasks, `{OURS}` compared with naive training",
    OURS,
    "points",
    (NAIVE,),
    _difference_from(OURS, MACRO_F1),
    digits=2,
)
PAIRED = (AGAINST_RIVALS, WITH_REPLAY, ON_GENERAL_TEXT)
"""Families beside that of the contenders."""
