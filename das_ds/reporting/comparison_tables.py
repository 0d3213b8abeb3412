"""Tables of a comparison as rows of text, header first, for `tables.format_markdown` and `tables.format_plain`."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Sequence
from functools import partial

from das_ds.reporting.comparison import Comparison, Group, ImportanceSummary, RunSummary
from das_ds.reporting.metrics import (
    FORGETTING,
    LOSS_AFTER_LEARNING,
    LOSS_AFTER_LEARNING_LATER,
    Metric,
    available_metrics,
    baseline_sweep,
    estimate_metric,
    forgetting_vs_matched_baseline,
    matched_baseline_forgetting,
    metric_difference,
)
from das_ds.reporting.overlap import expected_jaccard
from das_ds.reporting.results import measured
from das_ds.reporting.statistics import Difference, Estimate, holm
from das_ds.reporting.tables import Row, format_duration, format_loss

NONE = "-"


def settings_rows(comparison: Comparison) -> list[Row]:
    """Method, seeds, and the config keys in which the groups differ."""
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
    """Every metric as mean [interval] over seeds, one row per group."""
    metrics = available_metrics(comparison)
    rows = [
        [
            group.label,
            str(len(group.runs)),
            *(_format_estimate(estimate_metric(group, metric), metric) for metric in metrics),
        ]
        for group in comparison.groups
    ]
    return [["group", "seeds", *(metric.title for metric in metrics)], *rows]


def difference_rows(comparison: Comparison, family: Collection[str] | None = None) -> list[Row]:
    """Each group minus the baseline, paired by seed: mean [interval] and p-value per metric.

    Args:
        comparison: the groups.
        family: labels of the groups chosen for testing in advance. In each metric, p-values are corrected for their
            number (Holm); other groups get none. None: all groups that have a difference.
    """
    reference = comparison.group(comparison.reference)
    metrics = available_metrics(comparison)
    groups = [group for group in comparison.groups if group.label != reference.label]
    labels = [group.label for group in groups]
    columns = [[metric_difference(group, reference, metric) for group in groups] for metric in metrics]
    # Correction runs down a column, so cells are formatted by column and then read by row.
    cells = [_format_differences(labels, column, family) for column in columns]
    rows = []
    for index, label in enumerate(labels):
        differences = [column[index] for column in columns]
        num_pairs = max((difference.num_seeds for difference in differences if difference is not None), default=0)
        rows.append([label, str(num_pairs), *(column[index] for column in cells)])
    return [["group", "pairs", *(metric.title for metric in metrics)], *rows]


def matched_baseline_rows(comparison: Comparison, family: Collection[str] | None = None) -> list[Row]:
    """Forgetting of each group and of the baseline at equal loss after learning (2..T); no rows without a sweep.

    Args:
        comparison: the groups.
        family: as for `difference_rows`.
    """
    sweep = {group.label for group in baseline_sweep(comparison)}
    header = [
        "group",
        "pairs",
        LOSS_AFTER_LEARNING_LATER.title,
        "forgetting",
        "baseline at equal learning",
        "difference",
        "relative",
    ]
    if len(sweep) < 2:
        return [header]
    groups = [
        group
        for group in comparison.groups
        if group.label not in sweep and estimate_metric(group, FORGETTING) is not None
    ]
    differences = [forgetting_vs_matched_baseline(comparison, group) for group in groups]
    cells = _format_differences([group.label for group in groups], differences, family)
    rows: list[Row] = []
    for group, difference, cell in zip(groups, differences, cells, strict=True):
        baseline = matched_baseline_forgetting(comparison, group)
        loss = _format_estimate(estimate_metric(group, LOSS_AFTER_LEARNING_LATER), LOSS_AFTER_LEARNING_LATER)
        forgetting = _format_estimate(estimate_metric(group, FORGETTING), FORGETTING)
        if difference is None or baseline is None:
            rows.append([group.label, "0", loss, forgetting, NONE, NONE, NONE])
            continue
        relative = f"{difference.mean / baseline:+.0%}" if baseline > 0 else NONE
        rows.append([group.label, str(difference.num_seeds), loss, forgetting, f"{baseline:+.4f}", cell, relative])
    return [header, *rows]


def stage_rows(comparison: Comparison) -> list[Row]:
    """Mean held-out loss after each stage, all groups of a stage together."""
    stages = list(dict.fromkeys(stage for group in comparison.groups for stage in group.stages))
    rows = [
        [stage, group.label, *map(format_loss, mean_losses(group)[group.stages.index(stage)])]
        for stage in stages
        for group in comparison.groups
        if stage in group.stages
    ]
    return [["stage", "group", *comparison.eval_domains], *rows]


def forgetting_rows(comparison: Comparison) -> list[Row]:
    """Forgetting of each domain as mean [interval], one row per group."""
    domains = [
        domain
        for domain in comparison.domains
        if any(domain in run.forgetting_per_domain for group in comparison.groups for run in group.runs)
    ]
    metrics = [Metric(domain, partial(_domain_forgetting, domain)) for domain in domains]
    rows = [
        [group.label, *(_format_estimate(estimate_metric(group, metric), metric) for metric in metrics)]
        for group in comparison.groups
    ]
    return [["group", *domains], *rows]


def task_rows(comparison: Comparison) -> list[Row]:
    """Score of each end task before training, right after learning its domain and at the end, and its forgetting."""
    rows = []
    for group in comparison.groups:
        tasks = {task.name: task for run in group.runs if run.end_tasks is not None for task in run.end_tasks.tasks}
        for name, task in tasks.items():
            # A task of no domain has row_learned 0: nothing was learned for it.
            matrix_rows = (0, task.row_learned or None, -1)
            metrics = [Metric(name, partial(_task_score, name, row), is_signed=False) for row in matrix_rows]
            scores = [_format_estimate(estimate_metric(group, metric), LOSS_AFTER_LEARNING) for metric in metrics]
            forgetting = estimate_metric(group, Metric(name, partial(_task_forgetting, name)))
            rows.append(
                [
                    group.label,
                    name,
                    task.domain or NONE,
                    task.metric,
                    *scores,
                    _format_estimate(forgetting, FORGETTING),
                ]
            )
    return [["group", "task", "domain", "metric", "before", "after learning", "final", "forgetting"], *rows]


def mask_saturation_rows(comparison: Comparison) -> list[Row]:
    """Mean accumulated importance per unit group, the most saturated layer, and the fraction each source claims."""
    header = ["group", "granularity", "units", "mean importance", "capacity left", "most saturated layer", "claimed by"]
    rows = []
    for label, runs in importance_by_group(comparison).items():
        for name in runs[0].groups:
            layers = _mean_saturation(runs, name)
            mean = statistics.fmean(layers)
            top = max(range(len(layers)), key=layers.__getitem__)
            claims = [
                statistics.fmean(run.groups[name].claimed[i] for run in runs) for i in range(len(runs[0].sources))
            ]
            rows.append(
                [
                    label,
                    runs[0].granularity,
                    name,
                    f"{mean:.3f}",
                    f"{1 - mean:.3f}",
                    f"{top + 1} ({layers[top]:.3f})" if len(layers) > 1 else NONE,
                    ", ".join(f"{source} {claim:.1%}" for source, claim in zip(runs[0].sources, claims, strict=True)),
                ]
            )
    return [header, *rows]


def overlap_rows(comparison: Comparison) -> list[Row]:
    """Jaccard index, its value by chance, and cosine of each pair of sources, per unit group; means over seeds."""
    rows = []
    for label, runs in importance_by_group(comparison).items():
        sources = runs[0].sources
        for name in runs[0].groups:
            overlaps = [run.groups[name] for run in runs]
            for i, source in enumerate(sources):
                for j in range(i + 1, len(sources)):
                    jaccard = statistics.fmean(overlap.jaccard[i][j] for overlap in overlaps)
                    by_chance = statistics.fmean(
                        expected_jaccard(overlap.claimed[i], overlap.claimed[j]) for overlap in overlaps
                    )
                    cosine = statistics.fmean(overlap.cosine[i][j] for overlap in overlaps)
                    pair = f"{source}, {sources[j]}"
                    rows.append([label, name, pair, f"{jaccard:.3f}", f"{by_chance:.3f}", f"{cosine:.3f}"])
    return [["group", "units", "sources", "Jaccard", "by chance", "cosine"], *rows]


def cost_rows(comparison: Comparison) -> list[Row]:
    """Means over seeds of speed, time and memory, and speed relative to the baseline."""
    baseline_rate = _mean_of_known(run.cost.tokens_per_s for run in comparison.group(comparison.reference).runs)
    rows = []
    for group in comparison.groups:
        costs = [run.cost for run in group.runs]
        rate = _mean_of_known(cost.tokens_per_s for cost in costs)
        memory = _mean_of_known(cost.peak_memory_gib for cost in costs)
        rows.append(
            [
                group.label,
                NONE if rate is None else f"{rate:,.0f}",
                NONE if rate is None or not baseline_rate else f"{rate / baseline_rate:.2f}",
                format_duration(statistics.fmean(cost.wall_seconds for cost in costs)),
                ", ".join(dict.fromkeys(str(cost.num_ranks) for cost in costs)),
                f"{statistics.fmean(cost.rank_hours for cost in costs):.3f}",
                NONE if memory is None else f"{memory:.2f}",
            ]
        )
    header = ["group", "tokens/s", "relative speed", "wall time", "ranks", "rank hours", "peak memory (GiB)"]
    return [header, *rows]


def importance_by_group(comparison: Comparison) -> dict[str, list[ImportanceSummary]]:
    """Label -> importance of the runs that have it; groups without any are omitted."""
    summaries = {
        group.label: [run.importance for run in group.runs if run.importance is not None] for group in comparison.groups
    }
    return {label: runs for label, runs in summaries.items() if runs}


def mean_losses(group: Group) -> list[list[float | None]]:
    """The loss matrix, averaged over seeds; None where one was not measured."""
    return [
        [None if None in losses else statistics.fmean(map(measured, losses)) for losses in zip(*rows, strict=True)]
        for rows in zip(*(run.loss_matrix for run in group.runs), strict=True)
    ]


def _mean_saturation(runs: Sequence[ImportanceSummary], unit_group: str) -> list[float]:
    """Of each layer, averaged over runs."""
    by_run = [run.groups[unit_group].mask_saturation for run in runs]
    return [statistics.fmean(layer) for layer in zip(*by_run, strict=True)]


def _format_estimate(estimate: Estimate | None, metric: Metric) -> str:
    if estimate is None:
        return NONE
    sign = "+" if metric.is_signed else ""
    mean = f"{estimate.mean:{sign}.4f}"
    if estimate.low is None:
        return mean
    return f"{mean} [{estimate.low:{sign}.4f}, {estimate.high:{sign}.4f}]"


def _format_differences(
    labels: Sequence[str], differences: Sequence[Difference | None], family: Collection[str] | None
) -> list[str]:
    """One column: the differences of all groups in one metric, p-values corrected for the number of tests."""
    tested = {
        index: difference
        for index, difference in enumerate(differences)
        if difference is not None and difference.low is not None and (family is None or labels[index] in family)
    }
    # Members of the family without a difference still count as tests.
    num_tests = None if family is None else len(set(family) & set(labels))
    p_values = holm([difference.p_value for difference in tested.values()], num_tests)
    corrected = dict(zip(tested, p_values, strict=True))
    return [_format_difference(difference, corrected.get(index)) for index, difference in enumerate(differences)]


def _format_difference(difference: Difference | None, corrected_p: float | None) -> str:
    if difference is None:
        return NONE
    if difference.low is None:
        return f"{difference.mean:+.4f}"
    p_value = "" if corrected_p is None else f", p {corrected_p:.2g}"
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]{p_value}"


def _domain_forgetting(domain: str, run: RunSummary) -> float | None:
    return run.forgetting_per_domain.get(domain)


def _task_score(task: str, row: int | None, run: RunSummary) -> float | None:
    """The reported score of a task in one row of the score matrix."""
    if run.end_tasks is None or run.scores is None or row is None:
        return None
    names = [scored.name for scored in run.end_tasks.tasks]
    return run.scores.scores[row][names.index(task)] if task in names else None


def _task_forgetting(task: str, run: RunSummary) -> float | None:
    return None if run.scores is None else run.scores.forgetting.per_task.get(task)


def _mean_of_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
