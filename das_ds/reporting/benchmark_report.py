"""Benchmarks in the report of a run: accuracy by model, and the items that each model lost and won."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from das_ds.errors import RunFolderError
from das_ds.reporting.benchmark_matrix import BenchmarkMatrix, read_benchmark_matrix
from das_ds.reporting.document import Block, Section, Table, Text, replace_section
from das_ds.reporting.tables import Row
from das_ds.run_dir import REPORT_FILE, REPORT_FOLDER
from das_ds.storage import atomic_write

TITLE = "Benchmarks"
NEXT_SECTIONS = ("End tasks", "Cost and versions")
"""Sections of the report that come after this one."""
NONE = "-"


def benchmark_section(matrix: BenchmarkMatrix) -> Section:
    """The section of the report.

    Args:
        matrix: of the run.
    """
    blocks: list[Block] = [
        Text(
            "Accuracy of public benchmarks by log-likelihood; `greedy` is a cloze, right where every token is the\n"
            "most probable one. Chance is the accuracy of guessing."
        ),
        Table(accuracy_rows(matrix), text_columns=(0, 1)),
        Text("Adjusted for chance, (accuracy - chance) / (1 - chance): 0 is guessing."),
        Table(_adjusted_rows(matrix)),
    ]
    if any(value is not None for row in matrix.rows for value in row.bits_per_byte):
        blocks += [Text("Bits per byte of the right choice; lower is better."), Table(_bits_rows(matrix))]
    if len(transitions := _transition_rows(matrix)) > 1:
        text = (
            "Items against the model before training. Adjusted numbers are shares of all items, without what guessing\n"
            "explains (arXiv 2510.17776)."
        )
        blocks += [Text(text), Table(transitions, text_columns=(0, 1))]
    blocks += [Text(f"Left out: {sentence}.") for sentence in matrix.omitted]
    return Section(TITLE, blocks)


def accuracy_rows(matrix: BenchmarkMatrix) -> list[Row]:
    """Header, and a row per benchmark."""
    header = ["benchmark", "rule", "items", "chance", *matrix.stages]
    return [
        header,
        *(
            [row.name, row.rule, str(row.num_items), _percent(row.chance), *map(_percent, row.accuracy)]
            for row in matrix.rows
        ),
    ]


def update_report(run_folder: Path) -> BenchmarkMatrix | None:
    """Put the benchmark scores of a run into its report, if it has one; the matrix, None if no model was scored.

    Raises:
        RunFolderError: a file is damaged or cannot be written.
    """
    matrix = read_benchmark_matrix(run_folder)
    path = run_folder / REPORT_FOLDER / REPORT_FILE
    if matrix is None or not path.is_file():
        return matrix
    try:
        text = replace_section(path.read_text(encoding="utf-8"), benchmark_section(matrix), before=NEXT_SECTIONS)
        with atomic_write(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written ({error.strerror or error})") from error
    return matrix


def _adjusted_rows(matrix: BenchmarkMatrix) -> list[Row]:
    rows: list[Row] = [["benchmark", *matrix.stages]]
    rows += [[row.name, *map(_percent, row.adjusted)] for row in matrix.rows]
    if matrix.mean_adjusted is not None and len(matrix.rows) > 1:
        rows.append(["mean", *map(_percent, matrix.mean_adjusted)])
    return rows


def _bits_rows(matrix: BenchmarkMatrix) -> list[Row]:
    return [["benchmark", *matrix.stages], *([row.name, *map(_number, row.bits_per_byte)] for row in matrix.rows)]


def _transition_rows(matrix: BenchmarkMatrix) -> list[Row]:
    rows: list[Row] = [
        [
            "benchmark",
            "model",
            "right to wrong",
            "wrong to right",
            "forgetting, adjusted",
            "backward transfer, adjusted",
        ]
    ]
    for row in matrix.rows:
        for stage, transitions in zip(matrix.stages, row.transitions, strict=True):
            if transitions is None:
                continue
            adjusted: Sequence[float | None] = (
                (None, None) if row.guessing is None else transitions.adjusted(row.guessing)
            )
            counts = (str(transitions.right_to_wrong), str(transitions.wrong_to_right))
            rows.append([row.name, stage, *counts, *map(_percent, adjusted)])
    return rows


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100.0 * value:.1f}%"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"
