"""The command: read runs, group them, write the report, tell W&B."""

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
from das_ds.reporting.load_runs import read_run
from das_ds.reporting.metrics import available_metrics, estimate_metric
from das_ds.reporting.tables import aligned
from das_ds.run_dir import COMPARISON_FILE, REPORT_FILE
from das_ds.tracking.sinks import Scalar
from das_ds.tracking.tracker import build_job_tracker
from das_ds.tracking.wandb_sink import WandbJob

JOB_TYPE = "report"


def report_runs(arguments: Sequence[str], output: Path, against: str | None, *, wandb: bool) -> Comparison:
    """Compare runs, write comparison.json, report.md and pictures, and print the main table.

    Args:
        arguments: run folders, or LABEL=RUN.
        output: folder to write to.
        against: label of the group that the others are held against; None: the first.
        wandb: also log to W&B.

    Raises:
        DasError: runs that cannot be read or compared, or a folder that cannot be written.
    """
    if not arguments:
        raise RunFolderError("report: found no run, expected at least one run folder or LABEL=RUN")
    runs = [read_run(argument) for argument in arguments]
    comparison = compare_runs(runs, against)
    pictures = write_comparison_report(comparison, output)
    if wandb:
        _log(comparison, pictures, runs[0].config, output)
    print(aligned(tables.summary_rows(comparison)))
    for note in comparison.notes:
        print(f"note: {note}")
    print(f"report: {output / REPORT_FILE}, {output / COMPARISON_FILE}")
    return comparison


def _log(comparison: Comparison, pictures: dict[str, Path], config: RunConfig, output: Path) -> None:
    """A W&B run of its own in the project of the first run; whoever asks for it gets it, if only offline."""
    if config.wandb.mode == "disabled":
        config = config.model_copy(update={"wandb": config.wandb.model_copy(update={"mode": "auto"})})
    runs = [run.folder for group in comparison.groups for run in group.runs]
    job = WandbJob(output, JOB_TYPE, f"{output.resolve().name} {JOB_TYPE}", {"runs": runs})
    shown = {
        "summary": tables.summary_rows(comparison),
        "differences": tables.difference_rows(comparison),
        "cost": tables.cost_rows(comparison),
    }
    with build_job_tracker(config, job, enabled=True) as tracker:
        for name, (header, *body) in shown.items():
            tracker.log_table(name, header, body)
        tracker.log_table("runs", *_numbers(comparison))
        for name, path in pictures.items():
            tracker.log_image(name, path)
        tracker.log_summary(_means(comparison))


def _numbers(comparison: Comparison) -> tuple[list[str], list[list[Scalar]]]:
    """Column names and a row per run."""
    measures = available_metrics(comparison)
    rows: list[list[Scalar]] = []
    for group in comparison.groups:
        for run in group.runs:
            # Columns of W&B hold one type, so that a number that is not there is no text.
            values = [math.nan if (value := measure.of(run)) is None else value for measure in measures]
            rows.append([group.label, group.method, run.seed, *values])
    return ["group", "method", "seed", *(measure.title for measure in measures)], rows


def _means(comparison: Comparison) -> dict[str, float]:
    """`<label>/<measure>` -> mean over seeds."""
    return {
        f"{group.label}/{measure.title}": found.mean
        for group in comparison.groups
        for measure in available_metrics(comparison)
        if (found := estimate_metric(group, measure)) is not None
    }
