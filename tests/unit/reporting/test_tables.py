"""Tables as text, letter by letter."""

from __future__ import annotations

import pytest

from das_ds.reporting.tables import aligned, duration, markdown

ROWS = [["group", "seeds", "b"], ["das lr=1e-3", "2", "+0.5"]]


def test_markdown() -> None:
    assert markdown(ROWS).splitlines() == [
        "| group       | seeds |    b |",
        "| ----------- | ----: | ---: |",
        "| das lr=1e-3 |     2 | +0.5 |",
    ]


def test_aligned() -> None:
    assert aligned(ROWS, text_columns=(0, 2)).splitlines() == [
        "group        seeds  b",
        "------------------------",
        "das lr=1e-3      2  +0.5",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(3725.4, "1 h 02 min"), (59.6, "1 min 00 s"), (0.0, "0 min 00 s")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
