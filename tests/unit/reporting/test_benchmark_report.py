"""Benchmarks in the report: the matrix by benchmark and model, and the section."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from das_ds.benchmark.rules import Transitions
from das_ds.benchmark.scores import BenchmarkScores, ModelBenchmarks
from das_ds.errors import RunFolderError
from das_ds.reporting.benchmark_matrix import BenchmarkMatrix, read_benchmark_matrix
from das_ds.reporting.benchmark_report import benchmark_section, update_report
from das_ds.reporting.document import Section, Text, replace_section, section_markdown
from das_ds.reporting.results import Results
from das_ds.reporting.run_report import write_report
from helpers.configs import record_continued

FOLDERS = ("base", "domains/00_acl", "domains/01_pub_med")


def scores(correct: str, /, **changes: Any) -> BenchmarkScores:
    values: dict[str, Any] = {
        "settings": {"items": len(correct)},
        "num_items": len(correct),
        "chance": 0.25,
        "guessing": 1 / 3,
        "rule": "acc",
        "accuracy": {"acc": correct.count("1") / len(correct)},
        "correct": {"acc": correct},
        "bits_per_byte": 1.5,
        "num_truncated": 0,
    }
    return BenchmarkScores(**values | changes)


def write_scores(run: Path, *models: dict[str, BenchmarkScores]) -> None:
    for folder, tasks in zip(FOLDERS, models, strict=False):
        if tasks:
            (run / folder).mkdir(parents=True, exist_ok=True)
            ModelBenchmarks(model=folder, tasks=tasks).write(run / folder / "benchmarks.json")


def matrix_of(run: Path, *models: dict[str, BenchmarkScores]) -> BenchmarkMatrix:
    write_scores(run, *models)
    matrix = read_benchmark_matrix(run)
    assert matrix is not None
    return matrix


def cells(text: str, *first: str) -> list[str]:
    """Cells of the first Markdown row that begins with these."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return next(row for row in rows if row[: len(first)] == list(first))


def test_matrix_has_benchmarks_by_models(tmp_path: Path) -> None:
    arc = [scores(digits) for digits in ("1100", "1010", "0000")]
    words = scores("10", chance=0.0, guessing=0.0, rule="greedy", accuracy={"greedy": 0.5}, correct={"greedy": "10"})
    matrix = matrix_of(tmp_path, {"arc": arc[0]}, {"arc": arc[1], "words": words}, {"arc": arc[2], "words": words})
    assert matrix.stages == ["before training", "after acl", "after pub_med"]
    first, second = matrix.rows
    assert first.accuracy == [0.5, 0.5, 0.0] and second.accuracy == [None, 0.5, 0.5]
    assert first.adjusted == pytest.approx([1 / 3, 1 / 3, -1 / 3]) and second.adjusted == [None, 0.5, 0.5]
    assert first.transitions == [None, Transitions(4, 1, 1, 0.5, 0.5), Transitions(4, 2, 0, 0.5, 0.0)]
    assert second.transitions == [None, None, None]
    # The mean is over those that all models have.
    assert matrix.mean_adjusted == first.adjusted
    assert matrix.summary["words"] == {"after acl": 0.5, "after pub_med": 0.5}


def test_matrix_of_a_continued_run_has_models_of_the_earlier_one(tmp_path: Path) -> None:
    first, following = record_continued(tmp_path, ("acl", "law"), "acl", ("pub_med",))
    write_scores(first, {"arc": scores("0000")}, {"arc": scores("1000")})
    (first / "domains/01_law").mkdir()
    ModelBenchmarks(model="law", tasks={"arc": scores("1111")}).write(first / "domains/01_law/benchmarks.json")
    # The model after acl was scored again by this run.
    matrix = matrix_of(following, {}, {"arc": scores("1100")}, {"arc": scores("1110")})
    assert matrix.stages == ["before training", "after acl", "after pub_med"]
    assert matrix.rows[0].accuracy == [0.0, 0.5, 0.75]


def test_matrix_without_scores_is_none(tmp_path: Path) -> None:
    assert read_benchmark_matrix(tmp_path) is None


def test_matrix_leaves_out_scores_on_other_items(tmp_path: Path) -> None:
    matrix = matrix_of(tmp_path, {"arc": scores("11")}, {"arc": scores("1100")}, {"arc": scores("1110")})
    assert matrix.rows[0].accuracy == [None, 0.5, 0.75] and matrix.rows[0].transitions == [None] * 3
    assert matrix.omitted == ["arc before training was scored on other items than after pub_med"]
    assert f"Left out: {matrix.omitted[0]}." in section_markdown(benchmark_section(matrix))


def test_matrix_orders_more_than_a_hundred_domains(tmp_path: Path) -> None:
    for folder in ("domains/100_late", "domains/99_early"):
        (tmp_path / folder).mkdir(parents=True)
        ModelBenchmarks(model="m", tasks={"arc": scores("10")}).write(tmp_path / folder / "benchmarks.json")
    matrix = read_benchmark_matrix(tmp_path)
    assert matrix is not None and matrix.stages == ["after early", "after late"]
    assert matrix.rows[0].transitions == [None, None]


def test_matrix_damaged_file_raises(tmp_path: Path) -> None:
    write_scores(tmp_path, {"arc": scores("10")})
    (tmp_path / "base" / "benchmarks.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"benchmarks\.json: .*expected scores of benchmarks"):
        read_benchmark_matrix(tmp_path)


def test_section_has_all_numbers(tmp_path: Path) -> None:
    unknown = scores("1000", chance=None, guessing=None, bits_per_byte=None)
    models = [{"arc": scores(digits), "other": unknown} for digits in ("1100", "0101", "0000")]
    text = section_markdown(benchmark_section(matrix_of(tmp_path, *models)))
    assert cells(text, "arc", "acc") == ["arc", "acc", "4", "25.0%", "50.0%", "50.0%", "0.0%"]
    assert cells(text, "other", "acc")[3] == "-"
    adjusted = text.partition("Adjusted for chance")[2]
    assert cells(adjusted, "arc") == ["arc", "33.3%", "33.3%", "-33.3%"] and cells(adjusted, "other")[1:] == ["-"] * 3
    assert cells(adjusted, "mean") == ["mean", "33.3%", "33.3%", "-33.3%"]
    bits = text.partition("Bits per byte")[2]
    assert cells(bits, "arc") == ["arc", "1.5000", "1.5000", "1.5000"] and cells(bits, "other")[1:] == ["-"] * 3
    # g = (1/2) (1/2) (1/3) and (1/2) (1) (1/3)
    assert cells(text, "arc", "after acl") == ["arc", "after acl", "1", "1", "16.7%", "16.7%"]
    assert cells(text, "arc", "after pub_med") == ["arc", "after pub_med", "2", "0", "33.3%", "0.0%"]
    assert cells(text, "other", "after acl")[2:] == ["0", "0", "-", "-"]


def test_write_report_has_section_before_cost(make_results: Callable[..., Results], tmp_path: Path) -> None:
    write_scores(tmp_path, {"arc": scores("1100")})
    path = write_report(tmp_path, make_results("ncl"), None) / "report.md"
    text = path.read_text()
    assert text.index("## Forgetting") < text.index("## Benchmarks") < text.index("## Cost and versions")
    # Later scores change that section only, and the report that training would write is the same.
    write_scores(tmp_path, {"arc": scores("1100")}, {"arc": scores("1111")})
    assert update_report(tmp_path) == read_benchmark_matrix(tmp_path)
    updated = path.read_text()
    assert "after acl" in updated.partition("## Benchmarks")[2]
    write_report(tmp_path, make_results("ncl"), None)
    assert path.read_text() == updated != text


def test_replace_section_without_cost_is_last() -> None:
    section = Section("Benchmarks", [Text("new")])
    assert replace_section("# run\n", section, before=["Cost"]) == "# run\n## Benchmarks\n\nnew\n\n"
    report = "# run\n\n## Benchmarks\n\nold\n\n## End tasks\n\nx\n\n## Cost\n"
    expected = "# run\n\n## Benchmarks\n\nnew\n\n## End tasks\n\nx\n\n## Cost\n"
    assert replace_section(report, section, before=["Cost", "End tasks"]) == expected


def test_update_report_without_report_writes_none(tmp_path: Path) -> None:
    write_scores(tmp_path, {"arc": scores("1100")})
    assert update_report(tmp_path) is not None and not (tmp_path / "report").exists()
    assert update_report(tmp_path / "elsewhere") is None


def test_update_report_that_is_no_file_raises(tmp_path: Path) -> None:
    write_scores(tmp_path, {"arc": scores("1100")})
    report = tmp_path / "report" / "report.md"
    report.parent.mkdir()
    report.write_text("# run\n")
    (report.with_name("report.md.partial")).mkdir()
    with pytest.raises(RunFolderError, match=r"report\.md: cannot be written \("):
        update_report(tmp_path)
