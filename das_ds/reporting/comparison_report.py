"""The report of a comparison: report.md and its plots, and index.html, rendered from the model in comparison.json."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from das_ds.errors import RunFolderError
from das_ds.reporting import comparison_tables as tables
from das_ds.reporting.comparison import Comparison
from das_ds.reporting.comparison_plots import plot_loss_matrices, plot_mask_saturation, plot_overlap, plot_pareto
from das_ds.reporting.document import Bullets, Document, Plot, Section, Table, Text
from das_ds.reporting.html import render_html
from das_ds.reporting.metrics import baseline_sweep
from das_ds.run_dir import COMPARISON_FILE, HTML_REPORT_FILE, REPORT_FILE

MIN_SIGNIFICANT_PAIRS = 6
"""Pairs from which a single sign-flip test can reach a p-value below 0.05."""


def write_comparison_report(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Write comparison.json, report.md with its plots and index.html into a folder, which is created if needed.

    Returns:
        Name -> PNG file of each plot.

    Raises:
        RunFolderError: the folder cannot be written or is full.
    """
    document = _document(comparison)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = {plot.name: plot.write(folder) for plot in document.plots("markdown")}
        (folder / REPORT_FILE).write_text(document.markdown(), encoding="utf-8")
        (folder / HTML_REPORT_FILE).write_text(render_html(document), encoding="utf-8")
    except OSError as error:
        raise RunFolderError(
            f"--output {folder}: cannot be written ({error.strerror}); expected a folder with free space"
        ) from error
    comparison.write(folder / COMPARISON_FILE)
    return paths


def report_text(comparison: Comparison) -> str:
    """The report in Markdown."""
    return _document(comparison).markdown()


def _document(comparison: Comparison) -> Document:
    sections = [
        _summary(comparison),
        _differences(comparison),
        _matched_baseline(comparison),
        _losses(comparison),
        _end_tasks(comparison),
        _importance(comparison),
        _cost(comparison),
        _notes(comparison),
    ]
    text = (
        "Losses are nats per predicted token on held-out text; lower is better. Runs of one group differ only in\n"
        "their seed."
    )
    return Document(
        title=f"Runs over {' -> '.join(comparison.domains)}",
        blocks=[Text(text), Table(tables.settings_rows(comparison), text_columns=(0, 1))],
        sections=[section for section in sections if section is not None],
    )


def explain_intervals(comparison: Comparison) -> str:
    """Meaning of the brackets in the tables, given the number of seeds."""
    counts = sorted({len(group.runs) for group in comparison.groups})
    if counts[-1] == 1:
        return "One seed per group: no confidence interval; do not interpret small differences.\n"
    text = "In brackets: 95 % t interval over seeds, which assumes normally distributed errors.\n"
    small = [count for count in counts if 1 < count < MIN_SIGNIFICANT_PAIRS]
    if small:
        text += (
            f"With {' or '.join(map(str, small))} seeds it is wide, because the standard deviation is itself\n"
            "uncertain, and no p-value can be below 0.05.\n"
        )
    return text


def _summary(comparison: Comparison) -> Section:
    text = (
        "Means over domains. A run that learns less also forgets less, so compare forgetting at similar loss after\n"
        f"learning.\n{explain_intervals(comparison).rstrip()}"
    )
    signs = (
        "Positive forgetting: forgotten. Positive drift: text that is only evaluated got worse. Positive forward\n"
        "transfer: earlier domains helped later ones. Backward transfer is minus the forgetting."
    )
    return Section(
        "Learning and forgetting",
        [
            Text(text),
            Table(tables.summary_rows(comparison)),
            Text(signs),
            Plot("pareto", partial(plot_pareto, comparison)),
            Text("Forgetting by domain:"),
            Table(tables.forgetting_rows(comparison)),
        ],
    )


def _differences(comparison: Comparison) -> Section | None:
    rows = tables.difference_rows(comparison)
    if len(rows) == 1:
        return None
    text = (
        f"Group minus `{comparison.reference}`, paired by seed, which cancels effects of the seed common to both.\n"
        "p is that of the exact sign-flip test, at least 2^(1-n) for n pairs, Holm-corrected for the groups of its\n"
        "column. It is not corrected for the number of columns."
    )
    return Section(f"Compared with {comparison.reference}", [Text(text), Table(rows)])


def _matched_baseline(comparison: Comparison) -> Section | None:
    rows = tables.matched_baseline_rows(comparison)
    if len(rows) == 1:
        return None
    labels = ", ".join(f"`{group.label}`" for group in baseline_sweep(comparison))
    text = (
        f"The baseline sweep ({labels})\n"
        "shows how much less is forgotten by simply learning less. Each run is compared, seed by seed, with the\n"
        "baseline interpolated to the same loss after learning domains 2..T. A negative difference means that the run\n"
        "forgets less than the baseline at equal learning. Seeds outside the range of the sweep are not counted. p is\n"
        "Holm-corrected for the groups of this table."
    )
    return Section("Compared at equal learning", [Text(text), Table(rows)])


def _losses(comparison: Comparison) -> Section:
    text = (
        "Means over seeds. Read down a column: the loss falls where the domain is learned; any rise below that row is\n"
        "forgetting."
    )
    return Section(
        "Held-out loss",
        [
            Text(text),
            Table(tables.stage_rows(comparison), text_columns=(0, 1)),
            Plot("loss_matrices", partial(plot_loss_matrices, comparison)),
        ],
    )


def _end_tasks(comparison: Comparison) -> Section | None:
    rows = tables.task_rows(comparison)
    if len(rows) == 1:
        return None
    text = (
        "Test scores by the metric that each task reports; higher is better. The score of a run is the mean over the\n"
        "seeds of fine-tuning; brackets are over the seeds of training. Positive forgetting: the score fell."
    )
    return Section("End tasks", [Text(text), Table(rows, text_columns=(0, 1, 2, 3))])


def _importance(comparison: Comparison) -> Section:
    importance = tables.importance_by_group(comparison)
    missing = [group.label for group in comparison.groups if group.label not in importance]
    if not importance:
        return Section("Importance", [Text("Omitted: no run has importance files.")])
    omitted = [Text(f"Without importance files, omitted here: {', '.join(missing)}.")] if missing else []
    threshold = next(iter(importance.values()))[0].threshold
    saturation = (
        "Mask saturation is the mean of the accumulated importance; 1 minus it is the capacity left for later\n"
        f"domains. A source claims units with an importance of at least {threshold:g}."
    )
    overlap = (
        "Overlap of two sources: Jaccard index (units claimed by both / by either), its value for independent claims,\n"
        "and the cosine of all importance."
    )
    return Section(
        "Importance",
        [
            *omitted,
            Text(saturation),
            Table(tables.mask_saturation_rows(comparison), text_columns=(0, 1, 2, 6)),
            Plot("mask_saturation", partial(plot_mask_saturation, comparison)),
            Text(overlap),
            Table(tables.overlap_rows(comparison), text_columns=(0, 1, 2)),
            Plot("overlap", partial(plot_overlap, comparison)),
        ],
    )


def _cost(comparison: Comparison) -> Section:
    text = (
        "Means over seeds; speed is relative to the baseline. A rank is a GPU, or a process without one. Memory is\n"
        "that of rank 0: allocated on its GPU or, without one, resident in RAM."
    )
    return Section("Cost", [Text(text), Table(tables.cost_rows(comparison))])


def _notes(comparison: Comparison) -> Section | None:
    return Section("Notes", [Bullets(comparison.notes)]) if comparison.notes else None
