"""HTML pages as a browser reads them: tables, references to other places, and the nesting of elements."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = ("meta", "br", "img", "hr", "input", "link")
LOADING = ("src", "href", "xlink:href", "action", "data", "poster", "srcset")
"""Attributes that make a browser load something, or lead elsewhere."""


class Page(HTMLParser):
    """A parsed page.

    Args:
        text: of the page.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.headings: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        """Values of all attributes in `LOADING`."""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == [], f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in LOADING]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag in VOID:
            return
        self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "h2":
            self.headings.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if "h2" in self._open:
            self.headings[-1] += data
        elif ("td" in self._open or "th" in self._open) and "small" not in self._open:
            self.tables[-1][-1][-1] += data.strip()

    def row(self, first_cell: str) -> list[str]:
        """The first row of any table that begins with a cell."""
        return next(row for table in self.tables for row in table if row[0] == first_cell)
