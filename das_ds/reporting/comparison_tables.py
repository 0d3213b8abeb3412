"""The tables of a comparison as rows of text, the header first, for `tables.markdown` and `tables.aligned`."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Sequence
from functools import partial

from das_ds.reporting.comparison import Comparison, Group, ImportanceNumbers, RunNumbers
from das_ds.reporting.metrics import (
    FORGETTING,
    LEARNED,
    LEARNED_LATER,
    Metric,
    available_metrics,
    baseline_sweep,
    estimate_metric,
    forgetting_vs_matched_baseline,
    matched_baseline_forgetting,
    metric_difference,
)
from das_ds.reporting.overlap import expected_jaccard
from das_ds.reporting.statistics import Difference, Estimate, holm
from das_ds.reporting.tables import Row, duration

NONE = "-"


def settings_rows(comparison: Comparison) -> list[Row]:
    """What the groups are: method, seeds, and the keys in which they differ."""
    keys = list(dict.fromkeys(key for group in comparison.groups for key in group.settings))
    rows = [
        [
            group.label,
            group.method,
            ", ".join(str(run.seed) for run in group.runs),
            *(group.settings.get(key, NONE) for key in keys),
        ]
        for group in comparison.groups
    ]
    return [["group", "method", "seeds", *keys], *rows]


def summary_rows(comparison: Comparison) -> list[Row]:
    """Every measure as mean [interval] over seeds, a row per group."""
    measures = available_metrics(comparison)
    rows = [
        [
            group.label,
            str(len(group.runs)),
            *(_estimate(estimate_metric(group, measure), measure) for measure in measures),
        ]
        for group in comparison.groups
    ]
    return [["group", "seeds", *(measure.title for measure in measures)], *rows]


def difference_rows(comparison: Comparison, family: Collection[str] | None = None) -> list[Row]:
    """Each group minus the reference, paired by seed: mean [interval] and p-value per measure.

    Args:
        comparison: to take them from.
        family: labels of the groups that were to be tested; p-values are corrected for their number, by Holm, in each
            measure, and other groups have none. None: all groups of which there is a difference.
    """
    reference = comparison.group(comparison.reference)
    measures = available_metrics(comparison)
    groups = [group for group in comparison.groups if group.label != reference.label]
    columns = [[metric_difference(group, reference, measure) for group in groups] for measure in measures]
    labels = [group.label for group in groups]
    cells = [_differences(labels, column, family) for column in columns]
    rows = []
    for place, label in enumerate(labels):
        pairs = max((found.num_seeds for column in columns if (found := column[place]) is not None), default=0)
        rows.append([label, str(pairs), *(column[place] for column in cells)])
    return [["group", "pairs", *(measure.title for measure in measures)], *rows]


def line_rows(comparison: Comparison, family: Collection[str] | None = None) -> list[Row]:
    """Forgetting beside what the reference's method forgets where it learns domains 2..T as well; none without a line.

    Args:
        comparison: to take them from.
        family: as for `difference_rows`.
    """
    on_line = {group.label for group in baseline_sweep(comparison)}
    header = ["group", "pairs", LEARNED_LATER.title, "forgetting", "of the line there", "difference", "share"]
    groups = [
        group
        for group in comparison.groups
        if len(on_line) > 1 and group.label not in on_line and estimate_metric(group, FORGETTING) is not None
    ]
    found = [forgetting_vs_matched_baseline(comparison, group) for group in groups]
    cells = _differences([group.label for group in groups], found, family)
    rows: list[Row] = []
    for group, difference, cell in zip(groups, found, cells, strict=True):
        expected = matched_baseline_forgetting(comparison, group)
        own = [_estimate(estimate_metric(group, measure), measure) for measure in (LEARNED_LATER, FORGETTING)]
        if difference is None or expected is None:
            rows.append([group.label, "0", *own, NONE, NONE, NONE])
            continue
        share = f"{difference.mean / expected:+.0%}" if expected > 0 else NONE
        rows.append([group.label, str(difference.num_seeds), *own, f"{expected:+.4f}", cell, share])
    return [header, *rows]


def stage_rows(comparison: Comparison) -> list[Row]:
    """Mean held-out loss after each stage, the groups below one another."""
    stages = list(dict.fromkeys(stage for group in comparison.groups for stage in group.stages))
    rows = [
        [stage, group.label, *(f"{loss:.4f}" for loss in mean_losses(group)[group.stages.index(stage)])]
        for stage in stages
        for group in comparison.groups
        if stage in group.stages
    ]
    return [["stage", "group", *comparison.eval_domains], *rows]


def forgetting_rows(comparison: Comparison) -> list[Row]:
    """Forgetting of each domain as mean [interval], a row per group."""
    domains = [
        domain
        for domain in comparison.domains
        if any(domain in run.forgetting_per_domain for group in comparison.groups for run in group.runs)
    ]
    measures = [Metric(domain, partial(_forgetting_of, domain)) for domain in domains]
    rows = [
        [group.label, *(_estimate(estimate_metric(group, measure), measure) for measure in measures)]
        for group in comparison.groups
    ]
    return [["group", *domains], *rows]


def task_rows(comparison: Comparison) -> list[Row]:
    """Every end task before training, right after learning its domain and at the end, and what of it is forgotten."""
    rows = []
    for group in comparison.groups:
        tasks = {task.name: task for run in group.runs if run.end_tasks is not None for task in run.end_tasks.tasks}
        for name, task in tasks.items():
            scores = [
                _estimate(estimate_metric(group, Metric(name, partial(_score, name, row), is_signed=False)), LEARNED)
                for row in (0, task.row_learned or None, -1)
            ]
            forgotten = estimate_metric(group, Metric(name, partial(_score_forgetting, name)))
            rows.append(
                [group.label, name, task.domain or NONE, task.metric, *scores, _estimate(forgotten, FORGETTING)]
            )
    return [["group", "task", "domain", "metric", "before", "when learned", "at the end", "forgetting"], *rows]


def mask_saturation_rows(comparison: Comparison) -> list[Row]:
    """Mean accumulated importance per unit group, the fullest layer, and the share each source claims."""
    header = ["group", "granularity", "units", "mean importance", "capacity left", "fullest layer", "claimed by"]
    rows = []
    for label, runs in with_importance(comparison).items():
        for name in runs[0].groups:
            layers = [
                statistics.fmean(layer) for layer in zip(*(run.groups[name].fullness for run in runs), strict=True)
            ]
            full = statistics.fmean(layers)
            fullest = max(range(len(layers)), key=layers.__getitem__)
            claims = [
                statistics.fmean(run.groups[name].claimed[i] for run in runs) for i in range(len(runs[0].sources))
            ]
            claimed = ", ".join(f"{source} {share:.1%}" for source, share in zip(runs[0].sources, claims, strict=True))
            rows.append(
                [
                    label,
                    runs[0].granularity,
                    name,
                    f"{full:.3f}",
                    f"{1 - full:.3f}",
                    f"{fullest + 1} ({layers[fullest]:.3f})" if len(layers) > 1 else NONE,
                    claimed,
                ]
            )
    return [header, *rows]


def overlap_rows(comparison: Comparison) -> list[Row]:
    """Jaccard (and what chance would give) and cosine of each pair of sources, per unit group; means over seeds."""
    rows = []
    for label, runs in with_importance(comparison).items():
        sources = runs[0].sources
        for name in runs[0].groups:
            groups = [run.groups[name] for run in runs]
            for i, source in enumerate(sources):
                for j in range(i + 1, len(sources)):
                    chance = [expected_jaccard(group.claimed[i], group.claimed[j]) for group in groups]
                    jaccard = statistics.fmean(group.jaccard[i][j] for group in groups)
                    cosine = statistics.fmean(group.cosine[i][j] for group in groups)
                    numbers = [f"{value:.3f}" for value in (jaccard, statistics.fmean(chance), cosine)]
                    rows.append([label, name, f"{source}, {sources[j]}", *numbers])
    return [["group", "units", "sources", "Jaccard", "by chance", "cosine"], *rows]


def cost_rows(comparison: Comparison) -> list[Row]:
    """Means over seeds of what a run takes, and tokens per second as a share of the reference's."""
    base = _mean(run.cost.tokens_per_s for run in comparison.group(comparison.reference).runs)
    rows = []
    for group in comparison.groups:
        costs = [run.cost for run in group.runs]
        rate, memory = _mean(cost.tokens_per_s for cost in costs), _mean(cost.peak_memory_gib for cost in costs)
        rows.append(
            [
                group.label,
                NONE if rate is None else f"{rate:,.0f}",
                NONE if rate is None or not base else f"{rate / base:.2f}",
                duration(statistics.fmean(cost.wall_seconds for cost in costs)),
                ", ".join(dict.fromkeys(str(cost.num_ranks) for cost in costs)),
                f"{statistics.fmean(cost.rank_hours for cost in costs):.3f}",
                NONE if memory is None else f"{memory:.2f}",
            ]
        )
    return [["group", "tokens/s", "of reference", "wall time", "ranks", "rank hours", "peak memory (GiB)"], *rows]


def with_importance(comparison: Comparison) -> dict[str, list[ImportanceNumbers]]:
    """Label -> importance of the runs that have it; groups without any are left out."""
    found = {
        group.label: [run.importance for run in group.runs if run.importance is not None] for group in comparison.groups
    }
    return {label: runs for label, runs in found.items() if runs}


def mean_losses(group: Group) -> list[list[float]]:
    """The loss matrix, mean over seeds."""
    return [
        [statistics.fmean(losses) for losses in zip(*rows, strict=True)]
        for rows in zip(*(run.loss_matrix for run in group.runs), strict=True)
    ]


def _estimate(found: Estimate | None, measure: Metric) -> str:
    if found is None:
        return NONE
    sign = "+" if measure.is_signed else ""
    mean = f"{found.mean:{sign}.4f}"
    return mean if found.low is None else f"{mean} [{found.low:{sign}.4f}, {found.high:{sign}.4f}]"


def _differences(
    labels: Sequence[str], differences: Sequence[Difference | None], family: Collection[str] | None
) -> list[str]:
    """One measure of every group as text, p-values corrected for the tests there are."""
    tested = [
        index
        for index, found in enumerate(differences)
        if found is not None and found.low is not None and (family is None or labels[index] in family)
    ]
    num_tests = None if family is None else len(set(family) & set(labels))
    p_values = holm([found.p_value for index in tested if (found := differences[index]) is not None], num_tests)
    corrected = dict(zip(tested, p_values, strict=True))
    return [_difference(found, corrected.get(index)) for index, found in enumerate(differences)]


def _difference(found: Difference | None, corrected_p: float | None) -> str:
    if found is None:
        return NONE
    if found.low is None:
        return f"{found.mean:+.4f}"
    p_value = "" if corrected_p is None else f", p {corrected_p:.2g}"
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]{p_value}"


def _forgetting_of(domain: str, run: RunNumbers) -> float | None:
    return run.forgetting_per_domain.get(domain)


def _score(task: str, row: int | None, run: RunNumbers) -> float | None:
    """The reported score of a task in a row of the matrix."""
    if run.end_tasks is None or run.scores is None or row is None:
        return None
    names = [found.name for found in run.end_tasks.tasks]
    return run.scores.scores[row][names.index(task)] if task in names else None


def _score_forgetting(task: str, run: RunNumbers) -> float | None:
    return None if run.scores is None else run.scores.forgetting.per_task.get(task)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
