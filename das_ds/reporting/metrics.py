"""Metrics by which runs are compared: one value per run, means over seeds, and differences paired by seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from das_ds.reporting.comparison import Comparison, Group, RunSummary
from das_ds.reporting.statistics import (
    Difference,
    Estimate,
    Point,
    estimate,
    interpolate_front,
    paired_difference,
    pareto_front,
)

LEARNING_KEYS = "train."
"""Prefix of the config keys that decide how much a run learns; groups that differ only in these form a sweep."""
LAYER_LR_DECAY = "train.layer_lr_decay"
"""The exception: it decides where a run learns, and is a method of its own."""


@dataclass(frozen=True)
class Metric:
    """One value per run."""

    title: str
    """Column header."""
    value: Callable[[RunSummary], float | None]
    """None where it is undefined for the run."""
    is_signed: bool = True
    """Whether it is a change, printed with its sign."""


def _score(run: RunSummary) -> float | None:
    """Mean over all end tasks after the last stage; None if any is missing."""
    scores = [] if run.scores is None else run.scores.scores[-1]
    known = [score for score in scores if score is not None]
    return statistics.fmean(known) if known and len(known) == len(scores) else None


def _score_forgetting(run: RunSummary) -> float | None:
    return None if run.scores is None else run.scores.forgetting.average


def _score_forward_transfer(run: RunSummary) -> float | None:
    return None if run.scores is None else run.scores.forward_transfer


LOSS_AFTER_LEARNING = Metric("loss after learning", lambda run: run.loss_after_learning, is_signed=False)
LOSS_AFTER_LEARNING_LATER = Metric(
    "loss after learning (2..T)", lambda run: run.loss_after_learning_later, is_signed=False
)
"""The x-axis of every comparison at equal learning: see `RunSummary.loss_after_learning_later`."""
FINAL_LOSS = Metric("final loss", lambda run: run.final_loss, is_signed=False)
FORGETTING = Metric("forgetting", lambda run: run.forgetting)
GENERAL_DRIFT = Metric("general-domain drift", lambda run: run.general_drift)
FORWARD_TRANSFER = Metric("forward transfer", lambda run: run.forward_transfer)
SCORE = Metric("end-task score", _score, is_signed=False)
SCORE_FORGETTING = Metric("end-task forgetting", _score_forgetting)
SCORE_FORWARD_TRANSFER = Metric("end-task forward transfer", _score_forward_transfer)

ALL_METRICS = (
    LOSS_AFTER_LEARNING,
    LOSS_AFTER_LEARNING_LATER,
    FINAL_LOSS,
    FORGETTING,
    GENERAL_DRIFT,
    FORWARD_TRANSFER,
    SCORE,
    SCORE_FORGETTING,
    SCORE_FORWARD_TRANSFER,
)
"""In the order of the columns."""


def available_metrics(comparison: Comparison) -> list[Metric]:
    """Metrics that at least one run has; the (2..T) column only with several domains."""
    runs = [run for group in comparison.groups for run in group.runs]
    corpora = dict.fromkeys(corpus for run in runs for corpus in run.drift)
    place = ALL_METRICS.index(GENERAL_DRIFT) + 1
    metrics = [*ALL_METRICS[:place], *map(_drift_metric, corpora), *ALL_METRICS[place:]]
    metrics = [metric for metric in metrics if any(metric.value(run) is not None for run in runs)]
    if len(comparison.domains) == 1:
        metrics.remove(LOSS_AFTER_LEARNING_LATER)
    return metrics


def _drift_metric(corpus: str) -> Metric:
    return Metric(f"drift of {corpus}", lambda run: run.drift.get(corpus))


def metric_values(group: Group, metric: Metric) -> dict[int, float]:
    """Seed -> value, for the runs that have one."""
    values = {run.seed: metric.value(run) for run in group.runs}
    return {seed: value for seed, value in values.items() if value is not None}


def estimate_metric(group: Group, metric: Metric) -> Estimate | None:
    """Mean over seeds with its interval; None if no run has a value."""
    values = list(metric_values(group, metric).values())
    return estimate(values) if values else None


def metric_difference(group: Group, reference: Group, metric: Metric) -> Difference | None:
    """Group minus reference over their common seeds; None if they share none."""
    values = metric_values(group, metric)
    reference_values = metric_values(reference, metric)
    seeds = sorted(values.keys() & reference_values.keys())
    if not seeds:
        return None
    return paired_difference([values[seed] for seed in seeds], [reference_values[seed] for seed in seeds])


def baseline_sweep(comparison: Comparison) -> list[Group]:
    """The baseline and the groups that differ from it only in how much they learn, such as other learning rates.

    They show how much less is forgotten by simply learning less: the curve that a method has to beat.
    """
    reference = comparison.group(comparison.reference)

    def fixed_settings(group: Group) -> dict[str, str]:
        settings = group.settings.items()
        return {key: value for key, value in settings if key == LAYER_LR_DECAY or not key.startswith(LEARNING_KEYS)}

    return [
        group
        for group in comparison.groups
        if group.method == reference.method and fixed_settings(group) == fixed_settings(reference)
    ]


def forgetting_vs_matched_baseline(comparison: Comparison, group: Group) -> Difference | None:
    """Forgetting minus that of the baseline at the same loss after learning (2..T), paired by seed.

    Returns:
        None if no seed counts in `matched_pairs`.
    """
    pairs = matched_pairs(comparison, group).values()
    return paired_difference(*zip(*pairs, strict=True)) if pairs else None


def matched_baseline_forgetting(comparison: Comparison, group: Group) -> float | None:
    """Mean forgetting of the baseline over the seeds that count in `forgetting_vs_matched_baseline`."""
    pairs = matched_pairs(comparison, group).values()
    return statistics.fmean(baseline for _, baseline in pairs) if pairs else None


def matched_pairs(comparison: Comparison, group: Group) -> dict[int, tuple[float, float]]:
    """Seed -> forgetting of its run, and of the baseline at the same loss after learning (2..T).

    The baseline's forgetting is interpolated along the Pareto front of `baseline_sweep`: a rate at which another one
    learns more and forgets less is no rate to compare with. A seed whose loss is outside the range of its front is not
    counted.
    """
    sweep = baseline_sweep(comparison)
    pairs = {}
    for run in group.runs:
        baseline = _interpolate_baseline(sweep, run)
        if baseline is not None and run.forgetting is not None:
            pairs[run.seed] = run.forgetting, baseline
    return pairs


def _interpolate_baseline(sweep: list[Group], run: RunSummary) -> float | None:
    """Forgetting of the run's own seed in the sweep, at the run's loss after learning (2..T)."""
    points: list[Point] = [
        (other.loss_after_learning_later, other.forgetting)
        for group in sweep
        for other in group.runs
        if other.seed == run.seed and other.forgetting is not None
    ]
    front = [points[index] for index in pareto_front(points)]
    return interpolate_front(front, run.loss_after_learning_later)
