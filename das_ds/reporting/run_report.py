"""The report of one run: report.md with its plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from das_ds.errors import RunFolderError
from das_ds.functional.units import UnitValues
from das_ds.reporting.benchmark_matrix import BenchmarkMatrix, read_benchmark_matrix
from das_ds.reporting.benchmark_report import benchmark_section
from das_ds.reporting.curves import curves_section, plot_curves
from das_ds.reporting.plasticity import plasticity_section, plot_plasticity, read_plasticity
from das_ds.reporting.results import Results
from das_ds.reporting.run_plots import plot_importance, plot_loss_matrix
from das_ds.reporting.tables import format_duration, format_markdown
from das_ds.run_dir import CURVES_PLOT, IMPORTANCE_PLOT, LOSS_MATRIX_PLOT, PLASTICITY_PLOT, REPORT_FILE, REPORT_FOLDER
from das_ds.softmask.plasticity import DomainPlasticity

PROTECTED = 0.9
"""Units of at least this importance hardly change."""
NONE = "-"


def write_report(run_folder: Path, results: Results, importance: UnitValues | None) -> Path:
    """Write `report/` into the run folder: report.md, loss_matrix.png, and curves, importance and plasticity.

    The last three only where there are evaluations within domains, importance, and measured plasticity.

    Args:
        run_folder: of the run; in the folders of its domains may be files of what was left free to learn, and of scores
            on benchmarks.
        results: complete or not.
        importance: accumulated importance, unit group -> (L, U); None for methods without it.

    Returns:
        The folder.

    Raises:
        RunFolderError: the folder cannot be written or is full, or a file of a domain is damaged.
    """
    plasticity = read_plasticity(run_folder)
    benchmarks = read_benchmark_matrix(run_folder)
    folder = run_folder / REPORT_FOLDER
    try:
        folder.mkdir(exist_ok=True)
        plot_loss_matrix(results, folder / LOSS_MATRIX_PLOT)
        if results.evaluations:
            plot_curves(results, folder / CURVES_PLOT)
        if importance:
            plot_importance(importance, folder / IMPORTANCE_PLOT)
        if plasticity:
            plot_plasticity(plasticity, folder / PLASTICITY_PLOT)
        text = report_text(results, importance, plasticity, benchmarks)
        (folder / REPORT_FILE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunFolderError(
            f"{folder}: cannot be written ({error.strerror}); the run folder must be writable and have free space"
        ) from error
    return folder


def report_text(
    results: Results,
    importance: UnitValues | None,
    plasticity: Sequence[DomainPlasticity] = (),
    benchmarks: BenchmarkMatrix | None = None,
) -> str:
    """The Markdown text of a report."""
    sections = [_heading(results), _losses(results), _transfer(results)]
    if results.evaluations:
        sections.append(curves_section(results))
    if importance:
        sections.append(_mask_saturation(importance))
    if plasticity:
        sections.append(plasticity_section(plasticity))
    if benchmarks is not None:
        sections.append(benchmark_section(benchmarks))
    return "\n".join([*sections, _cost(results)])


def _heading(results: Results) -> str:
    num_learned = len(results.losses_learned)
    state = "complete" if results.complete else f"not complete: {num_learned} of {len(results.domains)} domains learned"
    return (
        f"# {results.method}: {' -> '.join(' + '.join(stage) for stage in results.learned)}\n\n"
        f"Continual pre-training with method `{results.method}` over {len(results.domains)} domains ({state}).\n"
    )


def _losses(results: Results) -> str:
    header = ["stage", *results.eval_domains]
    losses = [[stage, *(f"{loss:.4f}" for loss in row)] for stage, row in _stage_rows(results)]
    perplexities = [[stage, *(_perplexity(loss) for loss in row)] for stage, row in _stage_rows(results)]
    bits = ""
    if results.bits_per_byte is not None:
        by_stage = zip(results.stages, results.bits_per_byte, strict=True)
        rows = [header, *([stage, *(f"{value:.4f}" for value in row)] for stage, row in by_stage)]
        bits = (
            "\nAs bits per byte of the text, which models with different tokenizers can be compared by.\n\n"
            f"{format_markdown(rows)}\n"
        )
    return (
        "## Held-out loss\n\n"
        "Nats per predicted token, with fixed corruption; lower is better. Read down a column: the loss falls where\n"
        "its domain is learned; any rise below that row is forgetting.\n\n"
        f"{format_markdown([header, *losses])}\n\n"
        f"![loss matrix]({LOSS_MATRIX_PLOT})\n\n"
        "As perplexity, exp(loss): the effective number of equally likely tokens.\n\n"
        f"{format_markdown([header, *perplexities])}\n{bits}"
    )


def _transfer(results: Results) -> str:
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
            [f"drift of {corpus}", f"{value:+.4f}", "loss minus before training; above 0: worse"]
            for corpus, value in results.drift.items()
        ),
        ["backward transfer", _signed(results.backward_transfer), "above 0: later domains helped earlier ones"],
        ["forward transfer", _signed(results.forward_transfer), "above 0: earlier domains helped later ones"],
    ]
    return f"## Forgetting and transfer\n\n{format_markdown(rows, text_columns=(0, 2))}\n"


def _mask_saturation(importance: UnitValues) -> str:
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
    return (
        "## Mask saturation\n\n"
        "Importance accumulated over all domains so far. Updates of a unit are scaled by 1 - importance, so a mean of\n"
        "0.8 leaves a fifth of the capacity free.\n\n"
        f"{format_markdown(rows)}\n\n"
        f"![importance]({IMPORTANCE_PLOT})\n"
    )


def _cost(results: Results) -> str:
    rows = [
        ["tokens seen", f"{results.tokens_seen:,}"],
        ["wall time", format_duration(results.wall_seconds)],
        ["ranks", str(results.world_size)],
        ["ZeRO stage", str(results.zero_stage)],
        *([package, version] for package, version in results.versions.items()),
    ]
    return f"## Cost and versions\n\n{format_markdown([['', 'value'], *rows])}\n"


def _stage_rows(results: Results) -> list[tuple[str, list[float]]]:
    return list(zip(results.stages, results.loss_matrix, strict=True))


def _perplexity(loss: float) -> str:
    # Beyond e^20 the digits would only widen the table.
    return f"{math.exp(loss):.2f}" if loss < 20.0 else f"e^{loss:.1f}"


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+.4f}"
