"""Text tables, character by character."""

from __future__ import annotations

import pytest

from das_ds.reporting.tables import format_duration, format_markdown, format_plain

ROWS = [["group", "seeds", "b"], ["das lr=1e-3", "2", "+0.5"]]


def test_format_markdown_aligns_columns() -> None:
    assert format_markdown(ROWS).splitlines() == [
        "| group       | seeds |    b |",
        "| ----------- | ----: | ---: |",
        "| das lr=1e-3 |     2 | +0.5 |",
    ]


def test_format_plain_aligns_columns() -> None:
    assert format_plain(ROWS, text_columns=(0, 2)).splitlines() == [
        "group        seeds  b",
        "------------------------",
        "das lr=1e-3      2  +0.5",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(3725.4, "1 h 02 min"), (59.6, "1 min 00 s"), (0.0, "0 min 00 s")])
def test_format_duration_rounds_to_minutes_or_seconds(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
