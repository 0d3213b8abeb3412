"""The table of architectures in the docs is made of what tests record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from das_ds.models.architectures.registry import ARCHITECTURES
from helpers.matrix import BEGIN, END, VARIABLE, record, set_into

PAGE = Path(__file__).parents[2] / "docs" / "internals" / "architectures.md"


def test_records_are_kept_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    record("bert", "gates")
    path = tmp_path / "results.json"
    monkeypatch.setenv(VARIABLE, str(path))
    record("bert", "zero 2")
    record("bert", "units", "3, 40, 24")
    record("gpt2", "zero 2")
    assert json.loads(path.read_text()) == {"bert": {"zero 2": "yes", "units": "3, 40, 24"}, "gpt2": {"zero 2": "yes"}}
    with pytest.raises(AssertionError, match="zero 4: expected one of objective, units"):
        record("bert", "zero 4")


def test_table_takes_the_place_of_the_one_before() -> None:
    page = set_into(f"before\n{BEGIN}\nold\n{END}\nafter\n", {"gpt2": {"zero 2": "yes"}, "bert": {"units": "1, 2, 3"}})
    assert page.startswith(f"before\n{BEGIN}\n| Architecture | ") and page.endswith(f"not run.\n{END}\nafter\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert [row[0] for row in rows[2:]] == ["bert", "gpt2"]
    cells = [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
    assert cells[0]["Heads, intermediate, outputs"] == "1, 2, 3" and cells[0]["ZeRO 2"] == "-"
    assert cells[1]["ZeRO 2"] == "yes"


def test_the_page_shows_every_architecture() -> None:
    rows = [line for line in PAGE.read_text().split(BEGIN)[1].split(END)[0].splitlines() if line.startswith("|")]
    assert {row.split("|")[1].strip() for row in rows[2:]} == set(ARCHITECTURES)
