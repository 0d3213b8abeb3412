"""The report of a comparison: report.md and its plots, rendered from the model in comparison.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from das_ds.errors import RunFolderError
from das_ds.reporting import comparison_tables as tables
from das_ds.reporting.comparison import Comparison
from das_ds.reporting.comparison_plots import plot_loss_matrices, plot_mask_saturation, plot_overlap, plot_pareto
from das_ds.reporting.metrics import baseline_sweep
from das_ds.reporting.tables import Row, format_markdown
from das_ds.run_dir import COMPARISON_FILE, REPORT_FILE

PARETO = "pareto"
LOSS_MATRICES = "loss_matrices"
OVERLAP = "overlap"
MASK_SATURATION = "mask_saturation"
MIN_SIGNIFICANT_PAIRS = 6
"""Pairs from which a single sign-flip test can reach a p-value below 0.05."""


def write_comparison_report(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Write comparison.json, report.md and the plots into a folder, which is created if needed.

    Returns:
        Name -> PNG file of each plot.

    Raises:
        RunFolderError: the folder cannot be written or is full.
    """
    plots = _plots(comparison)
    paths = {name: folder / _png_name(name) for name in plots}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, plot in plots.items():
            plot(comparison, paths[name])
        (folder / REPORT_FILE).write_text(report_text(comparison), encoding="utf-8")
    except OSError as error:
        raise RunFolderError(
            f"--output {folder}: cannot be written ({error.strerror}); expected a folder with free space"
        ) from error
    comparison.write(folder / COMPARISON_FILE)
    return paths


def report_text(comparison: Comparison) -> str:
    """The report in Markdown."""
    sections = [
        _heading(comparison),
        _summary(comparison),
        _differences(comparison),
        _matched_baseline(comparison),
        _losses(comparison),
        _end_tasks(comparison),
        _importance(comparison),
        _cost(comparison),
        _notes(comparison),
    ]
    return "\n".join(section for section in sections if section)


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


def _heading(comparison: Comparison) -> str:
    return (
        f"# Runs over {' -> '.join(comparison.domains)}\n\n"
        "Losses are nats per predicted token on held-out text; lower is better. Runs of one group differ only in\n"
        "their seed.\n\n"
        f"{_table(tables.settings_rows(comparison), text_columns=(0, 1))}"
    )


def _summary(comparison: Comparison) -> str:
    return (
        "## Learning and forgetting\n\n"
        "Means over domains. A run that learns less also forgets less, so compare forgetting at similar loss after\n"
        "learning.\n"
        f"{explain_intervals(comparison)}\n"
        f"{_table(tables.summary_rows(comparison))}\n"
        "Positive forgetting: forgotten. Positive drift: text that is only evaluated got worse. Positive forward\n"
        "transfer: earlier domains helped later ones. Backward transfer is minus the forgetting.\n\n"
        f"{_image(PARETO)}\n"
        "Forgetting by domain:\n\n"
        f"{_table(tables.forgetting_rows(comparison))}"
    )


def _differences(comparison: Comparison) -> str:
    rows = tables.difference_rows(comparison)
    if len(rows) == 1:
        return ""
    return (
        f"## Compared with {comparison.reference}\n\n"
        f"Group minus `{comparison.reference}`, paired by seed, which cancels effects of the seed common to both.\n"
        "p is that of the exact sign-flip test, at least 2^(1-n) for n pairs, Holm-corrected for the groups of its\n"
        "column. It is not corrected for the number of columns.\n\n"
        f"{_table(rows)}"
    )


def _matched_baseline(comparison: Comparison) -> str:
    rows = tables.matched_baseline_rows(comparison)
    if len(rows) == 1:
        return ""
    labels = ", ".join(f"`{group.label}`" for group in baseline_sweep(comparison))
    return (
        "## Compared at equal learning\n\n"
        f"The baseline sweep ({labels})\n"
        "shows how much less is forgotten by simply learning less. Each run is compared, seed by seed, with the\n"
        "baseline interpolated to the same loss after learning domains 2..T. A negative difference means that the run\n"
        "forgets less than the baseline at equal learning. Seeds outside the range of the sweep are not counted. p is\n"
        "Holm-corrected for the groups of this table.\n\n"
        f"{_table(rows)}"
    )


def _losses(comparison: Comparison) -> str:
    return (
        "## Held-out loss\n\n"
        "Means over seeds. Read down a column: the loss falls where the domain is learned; any rise below that row is\n"
        "forgetting.\n\n"
        f"{_table(tables.stage_rows(comparison), text_columns=(0, 1))}\n"
        f"{_image(LOSS_MATRICES)}"
    )


def _end_tasks(comparison: Comparison) -> str:
    rows = tables.task_rows(comparison)
    if len(rows) == 1:
        return ""
    return (
        "## End tasks\n\n"
        "Test scores by the metric that each task reports; higher is better. The score of a run is the mean over the\n"
        "seeds of fine-tuning; brackets are over the seeds of training. Positive forgetting: the score fell.\n\n"
        f"{_table(rows, text_columns=(0, 1, 2, 3))}"
    )


def _importance(comparison: Comparison) -> str:
    importance = tables.importance_by_group(comparison)
    missing = [group.label for group in comparison.groups if group.label not in importance]
    if not importance:
        return "## Importance\n\nOmitted: no run has importance files.\n"
    omitted = f"Without importance files, omitted here: {', '.join(missing)}.\n\n" if missing else ""
    threshold = next(iter(importance.values()))[0].threshold
    return (
        "## Importance\n\n"
        f"{omitted}"
        "Mask saturation is the mean of the accumulated importance; 1 minus it is the capacity left for later\n"
        f"domains. A source claims units with an importance of at least {threshold:g}.\n\n"
        f"{_table(tables.mask_saturation_rows(comparison), text_columns=(0, 1, 2, 6))}\n"
        f"{_image(MASK_SATURATION)}\n"
        "Overlap of two sources: Jaccard index (units claimed by both / by either), its value for independent claims,\n"
        "and the cosine of all importance.\n\n"
        f"{_table(tables.overlap_rows(comparison), text_columns=(0, 1, 2))}\n"
        f"{_image(OVERLAP)}"
    )


def _cost(comparison: Comparison) -> str:
    return (
        "## Cost\n\n"
        "Means over seeds; speed is relative to the baseline. A rank is a GPU, or a process without one. Memory is\n"
        "that of rank 0: allocated on its GPU or, without one, resident in RAM.\n\n"
        f"{_table(tables.cost_rows(comparison))}"
    )


def _notes(comparison: Comparison) -> str:
    return "## Notes\n\n" + "".join(f"- {note}\n" for note in comparison.notes) if comparison.notes else ""


def _plots(comparison: Comparison) -> dict[str, Callable[[Comparison, Path], None]]:
    plots: dict[str, Callable[[Comparison, Path], None]] = {PARETO: plot_pareto, LOSS_MATRICES: plot_loss_matrices}
    if tables.importance_by_group(comparison):
        plots[MASK_SATURATION] = plot_mask_saturation
        plots[OVERLAP] = plot_overlap
    return plots


def _table(rows: list[Row], text_columns: tuple[int, ...] = (0,)) -> str:
    return format_markdown(rows, text_columns) + "\n"


def _image(name: str) -> str:
    return f"![{name.replace('_', ' ')}]({_png_name(name)})\n"


def _png_name(name: str) -> str:
    return f"{name}.png"
