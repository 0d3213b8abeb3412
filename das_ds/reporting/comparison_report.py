"""A comparison for people: report.md with its pictures, all drawn from the model in comparison.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from das_ds.errors import RunFolderError
from das_ds.reporting import comparison_tables as tables
from das_ds.reporting.comparison import Comparison
from das_ds.reporting.comparison_plots import loss_matrices_png, mask_saturation_png, overlap_png, pareto_png
from das_ds.reporting.metrics import baseline_sweep
from das_ds.reporting.tables import Row, markdown
from das_ds.run_dir import COMPARISON_FILE, REPORT_FILE

PARETO, LOSS_MATRICES, OVERLAP, MASK_SATURATION = "pareto", "loss_matrices", "overlap", "fullness"
"""Names of the pictures, each in a PNG file of its name."""
FEW = 6
"""Pairs from which a single sign-flip test can have a p-value below 0.05."""


def write_comparison_report(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Write comparison.json, report.md and the pictures into a folder, which is made where there is none.

    Returns:
        Name -> file of each picture.

    Raises:
        RunFolderError: the folder cannot be written or is full.
    """
    drawn = {name: folder / _file(name) for name in _pictures(comparison)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in _pictures(comparison).items():
            draw(comparison, drawn[name])
        (folder / REPORT_FILE).write_text(report_text(comparison), encoding="utf-8")
    except OSError as error:
        raise RunFolderError(
            f"--output {folder}: cannot be written ({error.strerror}); expected a folder with free space"
        ) from error
    comparison.write(folder / COMPARISON_FILE)
    return drawn


def report_text(comparison: Comparison) -> str:
    """The Markdown text."""
    parts = [
        _heading(comparison),
        _summary(comparison),
        _differences(comparison),
        _line(comparison),
        _losses(comparison),
        _end_tasks(comparison),
        _importance(comparison),
        _cost(comparison),
        _notes(comparison),
    ]
    return "\n".join(part for part in parts if part)


def interval_sentences(comparison: Comparison) -> str:
    """What the brackets in a comparison's tables mean, for the number of seeds it has."""
    counts = sorted({len(group.runs) for group in comparison.groups})
    if counts[-1] == 1:
        return "One seed per group: no interval can be given, and a small difference says nothing.\n"
    text = (
        "In brackets: 95 % t interval over seeds, which holds the true mean in 95 % of cases where seeds err\n"
        "normally.\n"
    )
    few = [count for count in counts if 1 < count < FEW]
    if few:
        text += (
            f"With {_listed(few)} seeds it is wide, for the spread is itself hardly known, and no p-value can be\n"
            "below 0.05.\n"
        )
    return text


def _listed(counts: list[int]) -> str:
    return " or ".join(map(str, counts))


def _heading(comparison: Comparison) -> str:
    return (
        f"# Runs over {' -> '.join(comparison.domains)}\n\n"
        "Losses are nats per predicted token on held-out text, lower is better. A group is runs that differ in their\n"
        "seed alone.\n\n"
        f"{_table(tables.settings_rows(comparison), text_columns=(0, 1))}"
    )


def _summary(comparison: Comparison) -> str:
    return (
        "## Learning and forgetting\n\n"
        "Means over domains. A run that learns less also forgets less: read forgetting beside the loss when learned.\n"
        f"{interval_sentences(comparison)}\n"
        f"{_table(tables.summary_rows(comparison))}\n"
        "Above 0 means: forgotten; general language got worse; earlier domains helped later ones. Backward transfer\n"
        "is minus the forgetting.\n\n"
        f"{_image(PARETO)}\n"
        "Forgetting by domain:\n\n"
        f"{_table(tables.forgetting_rows(comparison))}"
    )


def _differences(comparison: Comparison) -> str:
    rows = tables.difference_rows(comparison)
    if len(rows) == 1:
        return ""
    return (
        f"## Against {comparison.reference}\n\n"
        f"Group minus `{comparison.reference}`, paired by seed; what a seed does to both cancels. p is that of the\n"
        "exact sign-flip test, which of n pairs is at least 2^(1-n), after Holm's correction for the groups of its\n"
        "column; several columns are several chances to be lucky.\n\n"
        f"{_table(rows)}"
    )


def _line(comparison: Comparison) -> str:
    rows = tables.line_rows(comparison)
    if len(rows) == 1:
        return ""
    labels = ", ".join(f"`{group.label}`" for group in baseline_sweep(comparison))
    return (
        "## At equal learning\n\n"
        f"The line through {labels}\n"
        "shows how much less is forgotten by learning less alone. Each run is held against the line of its seed at\n"
        "the same loss when learned on domains 2..T, whose learning is what the earlier ones are forgotten by: below\n"
        "0, it forgets less than a run of the line that learned as much. Seeds beyond the ends of the line do not\n"
        "count.\n"
        "p is corrected, by Holm, for the groups of this table.\n\n"
        f"{_table(rows)}"
    )


def _losses(comparison: Comparison) -> str:
    return (
        "## Held-out loss\n\n"
        "Means over seeds. Read a column downwards: it falls where its domain is learned, and what it rises by below\n"
        "that is forgotten.\n\n"
        f"{_table(tables.stage_rows(comparison), text_columns=(0, 1))}\n"
        f"{_image(LOSS_MATRICES)}"
    )


def _end_tasks(comparison: Comparison) -> str:
    rows = tables.task_rows(comparison)
    if len(rows) == 1:
        return ""
    return (
        "## End tasks\n\n"
        "Test scores by the metric that each task reports, higher is better. Every run's score is the mean over the\n"
        "seeds of fine-tuning; brackets are over the seeds of training. Forgetting above 0: the score fell.\n\n"
        f"{_table(rows, text_columns=(0, 1, 2, 3))}"
    )


def _importance(comparison: Comparison) -> str:
    found = tables.with_importance(comparison)
    without = [group.label for group in comparison.groups if group.label not in found]
    if not found:
        return "## Importance\n\nLeft out: no run has importance files.\n"
    left_out = f"Without importance files, and left out here: {', '.join(without)}.\n\n" if without else ""
    threshold = next(iter(found.values()))[0].threshold
    return (
        "## Importance\n\n"
        f"{left_out}"
        "How full the mask is: mean of the accumulated importance; what is missing to 1 is left for later domains. A\n"
        f"source claims what has importance of at least {threshold:g}.\n\n"
        f"{_table(tables.mask_saturation_rows(comparison), text_columns=(0, 1, 2, 6))}\n"
        f"{_image(MASK_SATURATION)}\n"
        "Who claims the same: Jaccard (both claim / one of them claims), what independent choices would give, and the\n"
        "cosine of all importance.\n\n"
        f"{_table(tables.overlap_rows(comparison), text_columns=(0, 1, 2))}\n"
        f"{_image(OVERLAP)}"
    )


def _cost(comparison: Comparison) -> str:
    return (
        "## Cost\n\n"
        "Means over seeds. A rank is a GPU, or a process where there is none; memory is rank 0's, allocated on its\n"
        "GPU, or resident in RAM where there is none.\n\n"
        f"{_table(tables.cost_rows(comparison))}"
    )


def _notes(comparison: Comparison) -> str:
    return "## Notes\n\n" + "".join(f"- {note}\n" for note in comparison.notes) if comparison.notes else ""


def _pictures(comparison: Comparison) -> dict[str, Callable[[Comparison, Path], None]]:
    of_all = {PARETO: pareto_png, LOSS_MATRICES: loss_matrices_png}
    of_importance = (
        {MASK_SATURATION: mask_saturation_png, OVERLAP: overlap_png} if tables.with_importance(comparison) else {}
    )
    return {**of_all, **of_importance}


def _table(rows: list[Row], text_columns: tuple[int, ...] = (0,)) -> str:
    return markdown(rows, text_columns) + "\n"


def _image(name: str) -> str:
    return f"![{name.replace('_', ' ')}]({_file(name)})\n"


def _file(name: str) -> str:
    return f"{name}.png"
