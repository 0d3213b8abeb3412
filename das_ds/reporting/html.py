"""A report as one HTML page without other files, network or scripts: style and plots are inline."""

from __future__ import annotations

import re
import tempfile
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from das_ds.reporting.document import Document, Plot

TEMPLATE = "report.html.jinja"
RED = "178, 24, 43"
BLUE = "33, 102, 172"
MAX_OPACITY = 0.6
"""Black text stays readable on it."""


def render_html(document: Document) -> str:
    """The page of a report; everything in it that is not from das_ds is escaped."""
    return _template().render(document=document)


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"code": _mark_code, "svg": _inline_svg, "color": _color, "anchor": _anchor}
    return environment.get_template(TEMPLATE)


def _mark_code(text: str) -> Markup:
    """Text with `code` of Markdown as an element."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def _color(strength: float) -> str:
    """CSS color of a cell's background."""
    return f"rgba({RED if strength > 0 else BLUE}, {MAX_OPACITY * min(abs(strength), 1.0):.3f})"


def _inline_svg(plot: Plot) -> Markup:
    """The plot as an element; text stays text, in the font of the page."""
    import matplotlib

    with (
        tempfile.TemporaryDirectory() as folder,
        # The salt makes identifiers, and with them the page, the same each time.
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": plot.name, "font.family": "sans-serif"}),
    ):
        path = Path(folder) / f"{plot.name}.svg"
        plot.draw(path)
        text = path.read_text(encoding="utf-8")
    # What stands before the element, and the metadata, are for files and name other places.
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<svg ([^>]*)>", rf'<svg \1 role="img" aria-label="{escape(plot.title)}">', text, count=1)
    # Identifiers of several plots in one page must differ.
    for reference in (' id="', "url(#", 'href="#'):
        text = text.replace(reference, f"{reference}{plot.name}-")
    return Markup(text)
