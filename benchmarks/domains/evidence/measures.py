"""What the page says about one group of runs: shares of the naive forgetting, drift of the general loss, costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from das_ds.reporting.comparison import Comparison, Cost, Group, RunSummary
from das_ds.reporting.metrics import (
    LOSS_AFTER_LEARNING_LATER,
    Metric,
    baseline_sweep,
    estimate_metric,
    matched_pairs,
    metric_values,
)
from das_ds.reporting.statistics import Estimate, estimate

NO_VALUE = "-"


def _general_peak(run: RunSummary) -> float | None:
    """Largest rise of the general loss after any domain; the general corpus is the column after the domains."""
    general = [row[len(run.learned_rows) :] for row in run.loss_matrix]
    return max(row[0] for row in general[1:]) - general[0][0] if general[0] else None


def _macro_f1(run: RunSummary) -> float | None:
    """Mean macro-F1 over the end tasks of all domains after the last one, in points; None if any is missing."""
    scores = run.end_tasks.matrices["macro_f1"].scores[-1] if run.end_tasks else []
    known = [score for score in scores if score is not None]
    return 100 * statistics.fmean(known) if len(known) == len(run.learned_rows) else None


GENERAL_PEAK = Metric("general loss, at most", _general_peak)
GENERAL_END = Metric("general loss, at the end", lambda run: run.general_drift)
MACRO_F1 = Metric("end tasks (macro-F1)", _macro_f1, is_signed=False)


@dataclass(frozen=True)
class Share:
    """Forgetting as a fraction of that of naive training at equal loss after learning domains 2..T."""

    mean: float
    """Ratio of the means over seeds; at most 0 if nothing was forgotten."""
    num_seeds: int
    """Seeds whose naive training learned as much and as little."""
    by_seed: dict[int, float]
    """Ratio of each seed whose naive training forgot something."""

    @property
    def estimate(self) -> Estimate | None:
        """Mean of the ratios with its interval."""
        return estimate(list(self.by_seed.values())) if self.by_seed else None


def forgetting_share(comparison: Comparison, group: Group) -> Share | None:
    """The share of a group; None where naive training never learned as much or as little, or forgot nothing."""
    pairs = matched_pairs(comparison, group)
    baseline = sum(naive for _, naive in pairs.values())
    if baseline <= 0:
        return None
    by_seed = {seed: forgetting / naive for seed, (forgetting, naive) in pairs.items() if naive > 0}
    return Share(sum(forgetting for forgetting, _ in pairs.values()) / baseline, len(pairs), by_seed)


def describe_missing_share(comparison: Comparison, group: Group) -> str:
    """Why a group has no share."""
    sweep = [estimate_metric(one, LOSS_AFTER_LEARNING_LATER) for one in baseline_sweep(comparison)]
    losses = [found.mean for found in sweep if found is not None]
    learned = estimate_metric(group, LOSS_AFTER_LEARNING_LATER)
    assert learned is not None, "every run has a loss"
    if all(run.forgetting is None for run in group.runs):
        return "has no order of domains"
    if learned.mean < min(losses):
        return "learns more than naive training at any rate"
    if learned.mean > max(losses):
        return "learns less than naive training at any rate"
    return "learns more or less than the naive runs of its seeds, or these forget nothing"


def format_share(share: Share | None) -> str:
    """A share in percent; `none` where nothing was forgotten."""
    if share is None:
        return NO_VALUE
    return "none" if share.mean <= 0 else f"{share.mean:.0%}"


def format_share_of(comparison: Comparison, group: Group) -> str:
    """A group's share, with the number of seeds that it is the mean of where these are not all."""
    share = forgetting_share(comparison, group)
    text = format_share(share)
    num_runs = len(group.runs)
    return text if share is None or share.num_seeds == num_runs else f"{text} ({share.num_seeds} of {num_runs} seeds)"


def format_metric(group: Group, metric: Metric, digits: int = 3) -> str:
    """The mean over seeds."""
    found = estimate_metric(group, metric)
    sign = "+" if metric.is_signed else ""
    return NO_VALUE if found is None else f"{found.mean:{sign}.{digits}f}"


def relative_cost(comparison: Comparison, group: Group, cost: Callable[[Cost], float | None]) -> float | None:
    """A cost divided by that of naive training over the same seeds; None without common seeds that have it."""
    metric = Metric("cost", lambda run: cost(run.cost))
    values = metric_values(group, metric)
    baseline = metric_values(comparison.group(comparison.reference), metric)
    seeds = values.keys() & baseline.keys()
    if not seeds:
        return None
    return sum(values[seed] for seed in seeds) / sum(baseline[seed] for seed in seeds)


def relative_time(comparison: Comparison, group: Group) -> float | None:
    """Wall time relative to naive training, with evaluation and all that is measured between domains."""
    return relative_cost(comparison, group, lambda cost: cost.wall_seconds)


def relative_memory(comparison: Comparison, group: Group) -> float | None:
    """Peak memory relative to naive training."""
    return relative_cost(comparison, group, lambda cost: cost.peak_memory_gib)


def format_ratio(ratio: float | None) -> str:
    """A relative cost."""
    return NO_VALUE if ratio is None else f"{ratio:.2f}"


def compared_groups(comparison: Comparison) -> list[Group]:
    """All groups outside the baseline sweep."""
    sweep = {group.label for group in baseline_sweep(comparison)}
    return [group for group in comparison.groups if group.label not in sweep]
