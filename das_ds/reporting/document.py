"""A report as data: sections of text, tables and plots; rendered as Markdown here, and as HTML in `html.py`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias

from das_ds.reporting.tables import Row, format_markdown

Form = Literal["markdown", "html"]


@dataclass(frozen=True)
class Text:
    """A paragraph; of Markdown it has `code` only."""

    kind: ClassVar[str] = "text"
    text: str
    only: Form | None = None
    """The form that has it; None: both."""


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    kind: ClassVar[str] = "bullets"
    items: Sequence[str]
    only: Form | None = None


@dataclass(frozen=True)
class Shade:
    """How a cell of a table is colored."""

    change: float | None
    """Shown below the value; None: nothing to compare with yet, gray."""
    strength: float
    """From -1 (blue, better) to 1 (red, worse)."""
    is_reference: bool
    """Whether changes of its column are relative to it; framed."""


@dataclass(frozen=True)
class Table:
    """Rows of text, header first."""

    kind: ClassVar[str] = "table"
    rows: Sequence[Row]
    text_columns: Sequence[int] = (0,)
    """Aligned to the left."""
    shades: Sequence[Sequence[Shade]] | None = None
    """In HTML: of every row below the header, for every column but the first."""
    summary: str | None = None
    """In HTML: the table is folded behind this text."""
    only: Form | None = None


@dataclass(frozen=True)
class Plot:
    """A plot, which is a PNG file beside the Markdown and an inline SVG in HTML."""

    kind: ClassVar[str] = "plot"
    name: str
    """Stem of the PNG file."""
    draw: Callable[[Path], None]
    """Draws to a path, in the format of its ending."""
    only: Form | None = None

    @property
    def title(self) -> str:
        """The name in words."""
        return self.name.replace("_", " ")

    def write(self, folder: Path) -> Path:
        """Draw the PNG file, which replaces an earlier one at once: a tracker may be reading that.

        Raises:
            OSError: the folder cannot be written or is full; an earlier file is unchanged.
        """
        path = folder / f"{self.name}.png"
        # Drawn in the format of its ending.
        partial = folder / f".partial-{path.name}"
        try:
            self.draw(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path


Block: TypeAlias = Text | Bullets | Table | Plot


@dataclass(frozen=True)
class Section:
    """A heading of the second level and what is below it."""

    title: str
    blocks: Sequence[Block]
    only: Form | None = None


@dataclass(frozen=True)
class Document:
    """A report."""

    title: str
    blocks: Sequence[Block]
    """Before the first section."""
    sections: Sequence[Section]
    key_numbers: Sequence[tuple[str, str]] = ()
    """(name, value) shown at the top of the HTML page."""

    def plots(self, form: Form) -> list[Plot]:
        """All plots that a form has."""
        blocks = [*self.blocks, *(block for section in self._sections(form) for block in section.blocks)]
        return [block for block in blocks if isinstance(block, Plot) and block.only in (None, form)]

    def _sections(self, form: Form) -> list[Section]:
        return [section for section in self.sections if section.only in (None, form)]

    def markdown(self) -> str:
        """The report in Markdown."""
        parts = [f"# {self.title}", *_markdown_blocks(self.blocks)]
        for section in self._sections("markdown"):
            parts += [f"## {section.title}", *_markdown_blocks(section.blocks)]
        return "\n\n".join(parts) + "\n"


def replace_section(report: str, section: Section, *, before: Sequence[str]) -> str:
    """A report in Markdown with a section in place of the one of the same title, or of none.

    Args:
        report: the text.
        section: the new one.
        before: titles of the sections that it comes in front of, where they are there; else it is the last.
    """
    parts = re.split(r"^(?=## )", report, flags=re.MULTILINE)
    others = [part for part in parts if not part.startswith(f"## {section.title}\n")]
    headings = tuple(f"## {title}\n" for title in before)
    position = next((number for number, part in enumerate(others) if part.startswith(headings)), len(others))
    return "".join([*others[:position], f"{section_markdown(section)}\n", *others[position:]])


def section_markdown(section: Section) -> str:
    """One section in Markdown."""
    return "\n\n".join([f"## {section.title}", *_markdown_blocks(section.blocks)]) + "\n"


def _markdown_blocks(blocks: Sequence[Block]) -> list[str]:
    return [_markdown(block) for block in blocks if block.only in (None, "markdown")]


def _markdown(block: Block) -> str:
    match block:
        case Text():
            return block.text
        case Bullets():
            return "\n".join(f"- {item}" for item in block.items)
        case Table():
            return format_markdown(block.rows, block.text_columns)
        case Plot():
            return f"![{block.title}]({block.name}.png)"
