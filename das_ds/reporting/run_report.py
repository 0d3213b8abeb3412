"""The report of one run: report.md with its plots, and the same as one page, index.html."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from das_ds.errors import RunFolderError
from das_ds.functional.units import UnitValues
from das_ds.reporting.benchmark_matrix import BenchmarkMatrix, read_benchmark_matrix
from das_ds.reporting.benchmark_report import benchmark_section
from das_ds.reporting.curves import curves_section
from das_ds.reporting.document import Block, Document, Plot, Section, Shade, Table, Text, replace_section
from das_ds.reporting.html import render_html
from das_ds.reporting.plasticity import plasticity_section, read_plasticity
from das_ds.reporting.results import Results
from das_ds.reporting.run_plots import MIN_COLOR_RANGE, loss_changes, plot_importance, plot_loss_matrix
from das_ds.reporting.run_sections import (
    end_task_section,
    learning_section,
    read_recorded_config,
    settings_section,
)
from das_ds.reporting.tables import format_duration, format_loss
from das_ds.run_dir import (
    HTML_REPORT_FILE,
    IMPORTANCE_FILE,
    IMPORTANCE_PLOT,
    LOSS_MATRIX_PLOT,
    REPORT_FILE,
    REPORT_FOLDER,
    RESULTS_FILE,
)
from das_ds.softmask.importance_file import read_unit_importance
from das_ds.softmask.plasticity import DomainPlasticity
from das_ds.storage import atomic_write

UNDER_TRAINED = (
    "A value below 0 means that other text still improves the model: it is not fully trained on this one, and the\n"
    "run says little about what protection it gives."
)
PROTECTED = 0.9
"""Units of at least this importance hardly change."""
NONE = "-"


def write_report(run_folder: Path, results: Results, importance: UnitValues | None) -> Path:
    """Write `report/` into the run folder: report.md, its plots as PNG files, and index.html.

    Args:
        run_folder: of the run; its settings, metrics, scores and what was left free to learn are read from it.
        results: complete or not.
        importance: accumulated importance, unit group -> (L, U); None for methods without it.

    Returns:
        The folder.

    Raises:
        RunFolderError: the folder cannot be written or is full, or a file of a domain is damaged.
    """
    mask = [] if not importance else [_mask_saturation(importance)]
    document = _document(results, mask, read_plasticity(run_folder), read_benchmark_matrix(run_folder), run_folder)
    folder = run_folder / REPORT_FOLDER
    try:
        folder.mkdir(exist_ok=True)
        for plot in document.plots("markdown"):
            plot.write(folder)
        for name, text in ((REPORT_FILE, document.markdown()), (HTML_REPORT_FILE, render_html(document))):
            with atomic_write(folder / name) as partial:
                partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunFolderError(
            f"{folder}: cannot be written ({error.strerror}); the run folder must be writable and have free space"
        ) from error
    return folder


def refresh_report(run_folder: Path) -> None:
    """Write index.html, and the end tasks in report.md, anew after end tasks or benchmarks were scored.

    Nothing is written where a run has no report yet.

    Raises:
        RunFolderError: the results are damaged, or the folder cannot be written.
    """
    if not ((run_folder / RESULTS_FILE).exists() and (run_folder / REPORT_FOLDER).is_dir()):
        return
    results = Results.read(run_folder / RESULTS_FILE)
    mask = []
    if (run_folder / REPORT_FOLDER / IMPORTANCE_PLOT).exists():
        mask = [Section("Mask saturation", [Text(f"See {REPORT_FILE} and {IMPORTANCE_PLOT}.")])]
        if (importance := read_unit_importance(run_folder / IMPORTANCE_FILE)) is not None:
            mask = [_mask_saturation(importance)]
    benchmarks = read_benchmark_matrix(run_folder)
    page = render_html(_document(results, mask, read_plasticity(run_folder), benchmarks, run_folder))
    _replace(run_folder / REPORT_FOLDER / HTML_REPORT_FILE, page)
    text = run_folder / REPORT_FOLDER / REPORT_FILE
    for section in end_task_section(run_folder) if text.is_file() else ():
        report = replace_section(text.read_text(encoding="utf-8"), section, before=["Cost and versions"])
        _replace(text, report)


def _replace(path: Path, text: str) -> None:
    try:
        with atomic_write(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written ({error.strerror}); expected free space") from error


def report_text(
    results: Results,
    importance: UnitValues | None,
    plasticity: Sequence[DomainPlasticity] = (),
    benchmarks: BenchmarkMatrix | None = None,
) -> str:
    """The Markdown text of a report."""
    mask = [] if not importance else [_mask_saturation(importance)]
    return _document(results, mask, plasticity, benchmarks).markdown()


def _document(
    results: Results,
    mask: list[Section],
    plasticity: Sequence[DomainPlasticity],
    benchmarks: BenchmarkMatrix | None,
    run_folder: Path | None = None,
) -> Document:
    num_learned = len(results.losses_learned)
    state = "complete" if results.complete else f"not complete: {num_learned} of {len(results.domains)} domains learned"
    heading = f"Continual pre-training with method `{results.method}` over {len(results.domains)} domains ({state})."
    # From further files of the run.
    config = None if run_folder is None else read_recorded_config(run_folder)
    learning = [] if run_folder is None else learning_section(run_folder, config)
    others = [] if run_folder is None else [*end_task_section(run_folder), *settings_section(config)]
    return Document(
        title=f"{results.method}: {' -> '.join(' + '.join(stage) for stage in results.learned)}",
        blocks=[Text(heading)],
        sections=[
            _losses(results),
            _transfer(results),
            *learning,
            *([curves_section(results)] if results.evaluations else []),
            *mask,
            *([plasticity_section(plasticity)] if plasticity else []),
            *([benchmark_section(benchmarks)] if benchmarks is not None else []),
            *others,
            _cost(results),
        ],
        key_numbers=_key_numbers(results),
    )


def _key_numbers(results: Results) -> list[tuple[str, str]]:
    learned = list(results.losses_learned.values())
    final = [loss for corpus, loss in results.last_losses.items() if corpus in results.losses_learned]
    numbers = [("domains learned", f"{len(learned)} of {len(results.domains)}")]
    if learned:
        numbers.append(("loss after learning", f"{sum(learned) / len(learned):.4f}"))
        which = "loss now" if len(final) == len(learned) else f"loss now, of {len(final)} domains"
        numbers.append((which, f"{sum(final) / len(final):.4f}"))
    numbers.append(("average forgetting", _signed(results.forgetting.average)))
    numbers.append(("general-domain drift", _signed(results.general_drift)))
    return numbers


def _losses(results: Results) -> Section:
    header = ["stage", *results.eval_domains]
    losses = [[stage, *map(format_loss, row)] for stage, row in _stage_rows(results)]
    perplexities = [[stage, *(_perplexity(loss) for loss in row)] for stage, row in _stage_rows(results)]
    text = (
        "Nats per predicted token, with fixed corruption; lower is better. Read down a column: the loss falls where\n"
        "its domain is learned; any rise below that row is forgetting."
    )
    colors = (
        "Small number and color: change since the framed cell of the column (right after learning; general text: "
        "before training). Red is forgotten, blue is better, gray is not learned yet."
    )
    perplexity = "As perplexity, exp(loss): the effective number of equally likely tokens."
    blocks: list[Block] = [
        Text(text),
        Table([header, *losses], only="markdown"),
        Plot(Path(LOSS_MATRIX_PLOT).stem, partial(plot_loss_matrix, results), only="markdown"),
        Text(colors, only="html"),
        Table([header, *losses], shades=_shades(results), only="html"),
        Text(perplexity, only="markdown"),
        Table([header, *perplexities], only="markdown"),
        Table([header, *perplexities], summary=perplexity, only="html"),
    ]
    if results.bits_per_byte is not None:
        bits = "As bits per byte of the text, which models with different tokenizers can be compared by."
        by_stage = zip(results.stages, results.bits_per_byte, strict=True)
        rows = [header, *([stage, *map(format_loss, row)] for stage, row in by_stage)]
        blocks += [
            Text(bits, only="markdown"),
            Table(rows, only="markdown"),
            Table(rows, summary=bits, only="html"),
        ]
    return Section("Held-out loss", blocks)


def _shades(results: Results) -> list[list[Shade]]:
    """Colors of the loss matrix as in its plot: by the change since the reference of the column."""
    changes = loss_changes(results)
    limit = max(changes.nan_to_num().abs().max().item(), MIN_COLOR_RANGE)
    references = [results.rows_learned.get(corpus, 0) for corpus in results.eval_domains]
    return [
        [
            Shade(None, 0.0, False) if math.isnan(change) else Shade(change, change / limit, row == reference)
            for change, reference in zip(row_changes, references, strict=True)
        ]
        for row, row_changes in enumerate(changes.tolist())
    ]


def _transfer(results: Results) -> Section:
    per_domain = [
        [f"forgetting of {domain}", f"{value:+.4f}", "loss now minus loss right after learning it; above 0: forgotten"]
        for domain, value in results.forgetting.per_domain.items()
    ]
    rows = [
        ["metric", "nats", "how to read it"],
        *per_domain,
        ["average forgetting", _signed(results.forgetting.average), "mean of the above; the last stage is not counted"],
        [
            "general-domain drift",
            _signed(results.general_drift),
            "general loss minus before training; above 0: worse",
        ],
        *(
            [f"drift of {corpus}", _signed(value), "loss minus before training; above 0: worse"]
            for corpus, value in results.drift.items()
        ),
        *(
            [
                f"divergence from base on {stage}",
                f"{value:.4f}",
                "KL from base to model right after it; predicts forgetting",
            ]
            for stage, value in results.divergence_of_stages.items()
        ),
        ["backward transfer", _signed(results.backward_transfer), "above 0: later domains helped earlier ones"],
        ["forward transfer", _signed(results.forward_transfer), "above 0: earlier domains helped later ones"],
    ]
    blocks: list[Block] = [Table(rows, text_columns=(0, 2))]
    changes = [results.forgetting.average, results.general_drift, *results.drift.values()]
    if any(change is not None and change < 0.0 for change in changes):
        blocks.append(Text(UNDER_TRAINED))
    return Section("Forgetting and transfer", blocks)


def _mask_saturation(importance: UnitValues) -> Section:
    rows = [["unit group", "layers x units", "mean importance", f"units >= {PROTECTED}", "most saturated layer"]]
    for group, values in importance.items():
        layer_means = values.double().mean(dim=1)
        rows.append(
            [
                group,
                f"{values.shape[0]} x {values.shape[1]}",
                f"{layer_means.mean().item():.3f}",
                f"{(values >= PROTECTED).double().mean().item():.1%}",
                f"{int(layer_means.argmax()) + 1} ({layer_means.max().item():.3f})",
            ]
        )
    text = (
        "Importance accumulated over all domains so far. Updates of a unit are scaled by 1 - importance, so a mean of\n"
        "0.8 leaves a fifth of the capacity free."
    )
    return Section(
        "Mask saturation",
        [Text(text), Table(rows), Plot(Path(IMPORTANCE_PLOT).stem, partial(plot_importance, importance))],
    )


def _cost(results: Results) -> Section:
    rows = [
        ["tokens seen", f"{results.tokens_seen:,}"],
        ["wall time", format_duration(results.wall_seconds)],
        ["ranks", str(results.world_size)],
        ["ZeRO stage", str(results.zero_stage)],
        *([package, version] for package, version in results.versions.items()),
    ]
    return Section("Cost and versions", [Table([["", "value"], *rows])])


def _stage_rows(results: Results) -> list[tuple[str, list[float | None]]]:
    return list(zip(results.stages, results.loss_matrix, strict=True))


def _perplexity(loss: float | None) -> str:
    if loss is None:
        return NONE
    # Beyond e^20 the digits would only widen the table.
    return f"{math.exp(loss):.2f}" if loss < 20.0 else f"e^{loss:.1f}"


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+.4f}"
