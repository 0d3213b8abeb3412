"""The report folder of a run."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from das_ds.errors import RunFolderError
from das_ds.reporting.results import Results
from das_ds.reporting.run_report import UNDER_TRAINED, report_text, write_report

ResultsMaker = Callable[..., Results]
IMPORTANCE = {"head": torch.tensor([[0.0, 0.95], [0.9, 0.95]]), "output": torch.full((2, 5), 0.25)}


def table_row(text: str, first_cell: str) -> list[str]:
    """Cells of the first Markdown row that begins with a cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return next(row for row in rows if row[0] == first_cell)


def test_write_report_folder_has_text_and_plots(make_results: ResultsMaker, tmp_path: Path) -> None:
    folder = write_report(tmp_path, make_results(), IMPORTANCE)
    write_report(tmp_path, make_results(), IMPORTANCE)
    assert folder == tmp_path / "report"
    assert sorted(path.name for path in folder.iterdir()) == [
        "importance.png",
        "index.html",
        "loss_matrix.png",
        "report.md",
    ]
    text = (folder / "report.md").read_text()
    assert "(loss_matrix.png)" in text and "(importance.png)" in text


def test_write_report_without_importance_has_no_mask_section(make_results: ResultsMaker, tmp_path: Path) -> None:
    folder = write_report(tmp_path, make_results("ncl"), None)
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", "loss_matrix.png", "report.md"]
    assert "mask" not in (folder / "report.md").read_text()


def test_report_text_has_all_values(make_results: ResultsMaker) -> None:
    text = report_text(make_results(), IMPORTANCE)
    losses, perplexities = text.split("As perplexity")
    assert table_row(losses, "after pubmed") == ["after pubmed", "4.6000", "2.0000", "4.3000", "3.2000"]
    assert table_row(perplexities, "after pubmed")[2] == f"{math.exp(2):.2f}"
    assert table_row(text, "forgetting of acl")[1] == "+0.7000"
    assert table_row(text, "average forgetting")[1] == "+0.4500"
    assert table_row(text, "general-domain drift")[1] == "+0.4000"
    assert table_row(text, "forward transfer")[1] == "+0.1000"
    assert table_row(text, "head") == ["head", "2 x 2", "0.700", "75.0%", "2 (0.925)"]
    assert table_row(text, "output") == ["output", "2 x 5", "0.250", "0.0%", "1 (0.250)"]
    assert table_row(text, "tokens seen")[1] == "1,234,567"
    assert table_row(text, "wall time")[1] == "1 h 02 min"
    assert table_row(text, "torch")[1] == torch.__version__


def test_report_text_unfinished_run_says_so(make_results: ResultsMaker) -> None:
    text = report_text(make_results(num_rows=2, general=False), None)
    assert "not complete: 1 of 3 domains learned" in text
    assert table_row(text, "general-domain drift")[1] == "-"
    others = make_results().model_copy(update={"drift": {"law": -0.25, "code": 0.5}})
    assert UNDER_TRAINED in report_text(others, None) and UNDER_TRAINED not in report_text(make_results(), None)
    assert [table_row(report_text(others, None), f"drift of {name}")[1] for name in others.drift] == [
        "-0.2500",
        "+0.5000",
    ]


def test_report_text_pool_has_no_forgetting(make_results: ResultsMaker) -> None:
    pool = make_results("pool", num_rows=2, learned=[["acl", "pubmed", "restaurant"]])
    text = report_text(pool, None)
    assert text.startswith("# pool: acl + pubmed + restaurant\n") and "(complete)" in text
    assert table_row(text, "after pool")[1:] == ["4.0000", "4.5000", "4.1000", "3.1000"]
    assert [table_row(text, f"{name} transfer")[1] for name in ("backward", "forward")] == ["-", "-"]
    assert table_row(text, "average forgetting")[1] == "-" and "forgetting of" not in text


def test_report_text_huge_perplexity_is_an_exponent(make_results: ResultsMaker) -> None:
    losses = [[900.0, 1.0, 1.0, 1.0]]
    text = report_text(make_results(num_rows=1).model_copy(update={"loss_matrix": losses}), None)
    assert "e^900.0" in text


def test_write_report_unwritable_folder_is_named(make_results: ResultsMaker, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"missing/report: cannot be written \(No such file.*free space"):
        write_report(tmp_path / "missing", make_results(), None)


def test_write_report_replaces_complete_files_only(
    make_results: ResultsMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_report(tmp_path, make_results(), None)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    seen = []

    def fill_disk(figure: Figure, path: Path, **_: Any) -> None:
        path.write_bytes(b"half of a plot")
        # What a tracker would read.
        seen.append((folder / "loss_matrix.png").read_bytes())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Figure, "savefig", fill_disk)
    with pytest.raises(RunFolderError, match=r"cannot be written \(No space left on device\)"):
        write_report(tmp_path, make_results("ncl"), None)
    assert seen == [before["loss_matrix.png"]]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_report_text_has_bits_per_byte_of_causal_models_only(make_results: ResultsMaker) -> None:
    assert "bits per byte" not in report_text(make_results(), None)
    ratios = {"acl": 0.25, "pubmed": 0.5, "restaurant": 0.2, "general": 1.0}
    text = report_text(make_results().model_copy(update={"tokens_per_byte": ratios}), None)
    bits = text.split("As bits per byte")[1]
    # 4.6 nats per token, a quarter of a token per byte.
    assert table_row(bits, "after pubmed")[1:3] == [f"{4.6 / math.log(2) / 4:.4f}", f"{2.0 / math.log(2) / 2:.4f}"]


def test_report_leaves_out_what_was_not_measured(make_results: ResultsMaker, tmp_path: Path) -> None:
    matrix: list[list[float | None]] = [[6.0, None, 3.0], [4.0, 5.0, 3.1], [None, 2.0, 3.4]]
    forgetting = {"average": None, "per_domain": {}}
    results = make_results(num_rows=3, num_domains=2).model_copy(update={"loss_matrix": matrix})
    results = Results.model_validate({**results.model_dump(), "forgetting": forgetting, "complete": True})
    text = (write_report(tmp_path, results, None) / "report.md").read_text()
    losses, perplexities = text.split("As perplexity")
    assert table_row(losses, "before training") == ["before training", "6.0000", "-", "3.0000"]
    assert table_row(losses, "after pubmed") == ["after pubmed", "-", "2.0000", "3.4000"]
    assert table_row(perplexities, "after pubmed")[1] == "-"
    assert table_row(text, "average forgetting")[1] == "-"
    assert "loss now, of 1 domains" in (tmp_path / "report" / "index.html").read_text()
