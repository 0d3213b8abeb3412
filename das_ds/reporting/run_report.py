"""The report of a run for people: report.md with its two pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from das_ds.errors import RunFolderError
from das_ds.functional.units import UnitValues
from das_ds.reporting.results import Results
from das_ds.reporting.run_plots import importance_png, loss_matrix_png
from das_ds.reporting.tables import duration, markdown
from das_ds.run_dir import IMPORTANCE_PICTURE, LOSS_MATRIX_PICTURE, REPORT_FILE, REPORT_FOLDER

PROTECTED = 0.9
NONE = "-"


def write_report(run_folder: Path, results: Results, importance: UnitValues | None) -> Path:
    """Write `report/` into the run folder: report.md, loss_matrix.png and, where there is importance, importance.png.

    Args:
        importance: accumulated importance, unit group -> (L, U); None for methods without it.

    Returns:
        The folder.

    Raises:
        RunFolderError: the folder cannot be written or is full.
    """
    folder = run_folder / REPORT_FOLDER
    try:
        folder.mkdir(exist_ok=True)
        loss_matrix_png(results, folder / LOSS_MATRIX_PICTURE)
        if importance:
            importance_png(importance, folder / IMPORTANCE_PICTURE)
        (folder / REPORT_FILE).write_text(report_text(results, importance), encoding="utf-8")
    except OSError as error:
        raise RunFolderError(
            f"{folder}: cannot be written ({error.strerror}); the run folder must be writable and have free space"
        ) from error
    return folder


def report_text(results: Results, importance: UnitValues | None) -> str:
    """The Markdown text of a report."""
    parts = [_heading(results), _losses(results), _transfer(results)]
    if importance:
        parts.append(_mask(importance))
    return "\n".join([*parts, _cost(results)])


def _heading(results: Results) -> str:
    num_learned = len(results.losses_learned)
    state = "complete" if results.complete else f"not complete: {num_learned} of {len(results.domains)} domains learned"
    return (
        f"# {results.method}: {' -> '.join(' + '.join(stage) for stage in results.learned)}\n\n"
        f"Continual pre-training with method `{results.method}` over {len(results.domains)} domains ({state}).\n"
    )


def _losses(results: Results) -> str:
    header = ["stage", *results.eval_domains]
    losses = [[stage, *_numbers(row)] for stage, row in _staged(results)]
    perplexities = [[stage, *(_perplexity(loss) for loss in row)] for stage, row in _staged(results)]
    return (
        "## Held-out loss\n\n"
        "Nats per predicted token, with fixed corruption; lower is better. Read a column downwards: it falls where\n"
        "its domain is learned, and what it rises by below that is forgotten.\n\n"
        f"{markdown([header, *losses])}\n\n"
        f"![loss matrix]({LOSS_MATRIX_PICTURE})\n\n"
        "The same as perplexity, exp(loss): among how many tokens the model hesitates.\n\n"
        f"{markdown([header, *perplexities])}\n"
    )


def _transfer(results: Results) -> str:
    per_domain = [
        [f"forgetting of {domain}", f"{value:+.4f}", "loss now minus loss right after learning it; above 0: forgotten"]
        for domain, value in results.forgetting.per_domain.items()
    ]
    rows = [
        ["number", "nats", "how to read it"],
        *per_domain,
        ["average forgetting", _signed(results.forgetting.average), "mean of the above; the last stage cannot count"],
        ["general drift", _signed(results.general_drift), "general loss now minus before training; above 0: worse"],
        ["backward transfer", _signed(results.backward_transfer), "above 0: later domains helped earlier ones"],
        ["forward transfer", _signed(results.forward_transfer), "above 0: earlier domains helped later ones"],
    ]
    return f"## Forgetting and transfer\n\n{markdown(rows, text_columns=(0, 2))}\n"


def _mask(importance: UnitValues) -> str:
    rows = [["unit group", "layers x units", "mean importance", f"units >= {PROTECTED}", "fullest layer"]]
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
        "## How full the mask is\n\n"
        "Importance of all that was learned so far; the next domain moves a unit by 1 - importance, so a mean of 0.8\n"
        "leaves a fifth of the capacity free.\n\n"
        f"{markdown(rows)}\n\n"
        f"![importance]({IMPORTANCE_PICTURE})\n"
    )


def _cost(results: Results) -> str:
    rows = [
        ["tokens seen", f"{results.tokens_seen:,}"],
        ["wall time", duration(results.wall_seconds)],
        ["ranks", str(results.world_size)],
        ["ZeRO stage", str(results.zero_stage)],
        *([package, version] for package, version in results.versions.items()),
    ]
    return f"## Cost and versions\n\n{markdown([['', 'value'], *rows])}\n"


def _staged(results: Results) -> list[tuple[str, list[float]]]:
    return list(zip(results.stages, results.loss_matrix, strict=True))


def _numbers(losses: Sequence[float]) -> list[str]:
    return [f"{loss:.4f}" for loss in losses]


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.2f}" if loss < 20.0 else f"e^{loss:.1f}"


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+.4f}"
