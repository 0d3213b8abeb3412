"""Rows of text as a table, Markdown for files and aligned plain text for terminals, and times as text."""

from __future__ import annotations

from collections.abc import Sequence

Row = Sequence[str]


def markdown(rows: Sequence[Row], text_columns: Sequence[int] = (0,)) -> str:
    """A Markdown table whose source is aligned too; text columns to the left, the others to the right."""
    widths = _widths(rows)
    rule = ["-" * width if i in text_columns else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join("| " + " | ".join(_pad(row, widths, text_columns)) + " |" for row in [rows[0], rule, *rows[1:]])


def aligned(rows: Sequence[Row], text_columns: Sequence[int] = (0,)) -> str:
    """A plain-text table with a rule under its first row; text columns to the left, the others to the right."""
    widths = _widths(rows)
    lines = ["  ".join(_pad(row, widths, text_columns)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _widths(rows: Sequence[Row]) -> list[int]:
    return [max(max(map(len, column)), 3) for column in zip(*rows, strict=True)]


def _pad(row: Row, widths: Sequence[int], text_columns: Sequence[int]) -> list[str]:
    cells = zip(row, widths, strict=True)
    return [cell.ljust(width) if i in text_columns else cell.rjust(width) for i, (cell, width) in enumerate(cells)]
