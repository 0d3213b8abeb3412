"""What runs are compared by: one number per run, means over seeds, and differences paired by seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from das_ds.reporting.comparison import Comparison, Group, RunNumbers
from das_ds.reporting.statistics import Difference, Estimate, Point, estimate, interpolate_front, paired_difference

LEARNING_KEYS = "train."
"""Beginning of the keys that say how much a run learns: groups that differ in these alone lie on one line."""


@dataclass(frozen=True)
class Metric:
    """One number of a run."""

    title: str
    of: Callable[[RunNumbers], float | None]
    """None where the run has no such number."""
    is_signed: bool = True
    """Whether it is a change, shown with its sign."""


def _score(run: RunNumbers) -> float | None:
    """Mean over all end tasks after the last stage; None where one is missing."""
    scores = [] if run.scores is None else run.scores.scores[-1]
    known = [score for score in scores if score is not None]
    return statistics.fmean(known) if known and len(known) == len(scores) else None


def _score_forgetting(run: RunNumbers) -> float | None:
    return None if run.scores is None else run.scores.forgetting.average


def _score_forward(run: RunNumbers) -> float | None:
    return None if run.scores is None else run.scores.forward_transfer


LEARNED = Metric("loss when learned", lambda run: run.learned, is_signed=False)
LEARNED_LATER = Metric("loss when learned (2..T)", lambda run: run.learned_later, is_signed=False)
"""What runs are held beside each other at: see `RunNumbers.learned_later`."""
FINAL = Metric("loss at the end", lambda run: run.final, is_signed=False)
FORGETTING = Metric("forgetting", lambda run: run.forgetting)
DRIFT = Metric("general drift", lambda run: run.general_drift)
FORWARD = Metric("forward transfer", lambda run: run.forward_transfer)
SCORE = Metric("end-task score", _score, is_signed=False)
SCORE_FORGETTING = Metric("end-task forgetting", _score_forgetting)
SCORE_FORWARD = Metric("end-task forward transfer", _score_forward)


def available_metrics(comparison: Comparison) -> list[Metric]:
    """Those that some run has."""
    later = [LEARNED_LATER] if len(comparison.domains) > 1 else []
    known = [LEARNED, *later, FINAL, FORGETTING, DRIFT, FORWARD, SCORE, SCORE_FORGETTING, SCORE_FORWARD]
    runs = [run for group in comparison.groups for run in group.runs]
    return [measure for measure in known if any(measure.of(run) is not None for run in runs)]


def metric_values(group: Group, measure: Metric) -> dict[int, float]:
    """Seed -> number, for the runs that have it."""
    found = {run.seed: measure.of(run) for run in group.runs}
    return {seed: value for seed, value in found.items() if value is not None}


def estimate_metric(group: Group, measure: Metric) -> Estimate | None:
    """Mean over seeds with its interval; None where no run has the number."""
    values = list(metric_values(group, measure).values())
    return estimate(values) if values else None


def metric_difference(group: Group, reference: Group, measure: Metric) -> Difference | None:
    """Group minus reference over the seeds of both; None where they share none."""
    these, others = metric_values(group, measure), metric_values(reference, measure)
    common = sorted(these.keys() & others.keys())
    if not common:
        return None
    return paired_difference([these[seed] for seed in common], [others[seed] for seed in common])


def baseline_sweep(comparison: Comparison) -> list[Group]:
    """The reference and the groups that differ from it in how much they learn alone, such as its other learning rates.

    Their runs show what forgetting costs nothing but learning less: the line that protection has to beat.
    """
    reference = comparison.group(comparison.reference)

    def others(group: Group) -> dict[str, str]:
        return {key: value for key, value in group.settings.items() if not key.startswith(LEARNING_KEYS)}

    return [
        group for group in comparison.groups if group.method == reference.method and others(group) == others(reference)
    ]


def forgetting_vs_matched_baseline(comparison: Comparison, group: Group) -> Difference | None:
    """Forgetting minus that of the reference's line at the same loss when learned on domains 2..T, seed by seed.

    Between two runs of the line it is interpolated; a seed whose loss lies beyond the line's ends does not count. None
    where no seed counts.
    """
    pairs = [pair for run in group.runs if (pair := _beside_line(comparison, run)) is not None]
    return paired_difference(*zip(*pairs, strict=True)) if pairs else None


def matched_baseline_forgetting(comparison: Comparison, group: Group) -> float | None:
    """Mean forgetting of the line at the losses of a group's seeds that count in `forgetting_vs_matched_baseline`."""
    pairs = [pair for run in group.runs if (pair := _beside_line(comparison, run)) is not None]
    return sum(on_line for _, on_line in pairs) / len(pairs) if pairs else None


def _beside_line(comparison: Comparison, run: RunNumbers) -> tuple[float, float] | None:
    """Forgetting of a run and of the line of its seed."""
    points: list[Point] = [
        (other.learned_later, other.forgetting)
        for group in baseline_sweep(comparison)
        for other in group.runs
        if other.seed == run.seed and other.forgetting is not None
    ]
    on_line = interpolate_front(points, run.learned_later)
    return None if on_line is None or run.forgetting is None else (run.forgetting, on_line)
