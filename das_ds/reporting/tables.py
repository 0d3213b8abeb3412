"""Text tables: rows formatted as Markdown for files or as aligned plain text for terminals."""

from __future__ import annotations

from collections.abc import Sequence

Row = Sequence[str]


def format_markdown(rows: Sequence[Row], text_columns: Sequence[int] = (0,)) -> str:
    """A Markdown table with an aligned source.

    Args:
        rows: header first.
        text_columns: aligned to the left; all others to the right.
    """
    widths = _column_widths(rows)
    rule = ["-" * width if i in text_columns else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join("| " + " | ".join(_pad(row, widths, text_columns)) + " |" for row in [rows[0], rule, *rows[1:]])


def format_plain(rows: Sequence[Row], text_columns: Sequence[int] = (0,)) -> str:
    """A plain-text table with a rule below the header; arguments as for `format_markdown`."""
    widths = _column_widths(rows)
    lines = ["  ".join(_pad(row, widths, text_columns)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def format_duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, seconds_left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds_left:02} s"


def format_loss(loss: float | None) -> str:
    """A loss to four digits; `-` where it was not measured."""
    return "-" if loss is None else f"{loss:.4f}"


def _column_widths(rows: Sequence[Row]) -> list[int]:
    # A Markdown rule needs three characters.
    return [max(max(map(len, column)), 3) for column in zip(*rows, strict=True)]


def _pad(row: Row, widths: Sequence[int], text_columns: Sequence[int]) -> list[str]:
    cells = zip(row, widths, strict=True)
    return [cell.ljust(width) if i in text_columns else cell.rjust(width) for i, (cell, width) in enumerate(cells)]
