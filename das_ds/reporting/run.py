"""The report command: load runs, group them, write the report, and log it to W&B."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from das_ds.config import RunConfig
from das_ds.errors import RunFolderError
from das_ds.reporting import comparison_tables as tables
from das_ds.reporting.comparison import Comparison
from das_ds.reporting.comparison_report import write_comparison_report
from das_ds.reporting.group_runs import compare_runs
from das_ds.reporting.load_runs import load_run
from das_ds.reporting.metrics import available_metrics, estimate_metric
from das_ds.reporting.tables import format_plain
from das_ds.run_dir import COMPARISON_FILE, HTML_REPORT_FILE, REPORT_FILE
from das_ds.tracking.sinks import Scalar
from das_ds.tracking.tracker import build_job_tracker
from das_ds.tracking.wandb_sink import WandbJob

JOB_TYPE = "report"


def report_runs(arguments: Sequence[str], output: Path, baseline: str | None, *, wandb: bool) -> Comparison:
    """Compare runs, write comparison.json, report.md, index.html and plots, and print the main table.

    Args:
        arguments: run folders, or LABEL=RUN.
        output: folder to write to.
        baseline: label of the group that all others are compared with; None: the first.
        wandb: also log to W&B.

    Raises:
        DasError: runs cannot be read or compared, or the folder cannot be written.
    """
    if not arguments:
        raise RunFolderError("report: found no run, expected at least one run folder or LABEL=RUN")
    runs = [load_run(argument) for argument in arguments]
    comparison = compare_runs(runs, baseline)
    plots = write_comparison_report(comparison, output)
    if wandb:
        _log_to_wandb(comparison, plots, runs[0].config, output)
    print(format_plain(tables.summary_rows(comparison)))
    for note in comparison.notes:
        print(f"note: {note}")
    print(f"report: {output / REPORT_FILE}, {output / HTML_REPORT_FILE}, {output / COMPARISON_FILE}")
    return comparison


def _log_to_wandb(comparison: Comparison, plots: dict[str, Path], config: RunConfig, output: Path) -> None:
    """Log to a separate W&B run in the project of the first run, whose config is given."""
    # The user asked for W&B on the command line, so at least an offline run is written.
    if config.wandb.mode == "disabled":
        config = config.model_copy(update={"wandb": config.wandb.model_copy(update={"mode": "auto"})})
    config = config.model_copy(update={"tracking": None})
    runs = [run.folder for group in comparison.groups for run in group.runs]
    job = WandbJob(output, JOB_TYPE, f"{output.resolve().name} {JOB_TYPE}", {"runs": runs})
    text_tables = {
        "summary": tables.summary_rows(comparison),
        "differences": tables.difference_rows(comparison),
        "cost": tables.cost_rows(comparison),
    }
    with build_job_tracker(config, job, enabled=True) as tracker:
        for name, (header, *rows) in text_tables.items():
            tracker.log_table(name, header, rows)
        tracker.log_table("runs", *_run_table(comparison))
        for name, path in plots.items():
            tracker.log_image(name, path)
        tracker.log_summary(_mean_metrics(comparison))


def _run_table(comparison: Comparison) -> tuple[list[str], list[list[Scalar]]]:
    """Column names, and one row of metrics per run."""
    metrics = available_metrics(comparison)
    rows: list[list[Scalar]] = []
    for group in comparison.groups:
        for run in group.runs:
            # A W&B column has one type, so a missing value is NaN, not text.
            values = [math.nan if (value := metric.value(run)) is None else value for metric in metrics]
            rows.append([group.label, group.method, run.seed, *values])
    return ["group", "method", "seed", *(metric.title for metric in metrics)], rows


def _mean_metrics(comparison: Comparison) -> dict[str, float]:
    """`<label>/<metric>` -> mean over seeds."""
    return {
        f"{group.label}/{metric.title}": estimate.mean
        for group in comparison.groups
        for metric in available_metrics(comparison)
        if (estimate := estimate_metric(group, metric)) is not None
    }
