"""Evaluations within domains in the report of a run: curves over steps, and how each domain ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from das_ds.checkpoint.manifest import DomainEvaluation
from das_ds.config.stage import stage_name
from das_ds.reporting.document import Plot, Section, Table, Text
from das_ds.reporting.results import Results
from das_ds.reporting.run_plots import DPI, new_figure
from das_ds.reporting.tables import Row
from das_ds.run_dir import CURVES_PLOT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NONE = "-"
NUM_COLUMNS = 2
LABEL_OFFSET = (3, -3)
"""Points from the upper end of the border of a domain to its name, right of it and within the plot."""


@dataclass(frozen=True)
class Gap:
    """The stability gap of one corpus in one domain: the loss that it had in between, above that at both ends."""

    corpus: str
    domain: str
    """The domain that was learned."""
    step: int
    """Of the domain, at which the loss was highest."""
    start: float
    """Loss when the domain began."""
    highest: float
    end: float
    """Loss at its last evaluation."""

    @property
    def height(self) -> float:
        """Highest loss minus the larger of those at both ends, nats; 0 where an end is the highest."""
        return self.highest - max(self.start, self.end)


def stability_gaps(results: Results) -> list[Gap]:
    """The gap of each other corpus in each domain: text that the domain does not learn (De Lange et al., *Continual
    evaluation for lifelong learning: identifying the stability gap*, ICLR 2023)."""
    learned = {stage_name(domains): domains for domains in results.learned}
    gaps = []
    for domain, records in _by_domain(results.evaluations).items():
        for corpus in records[0].losses:
            if corpus in learned[domain] or len(records) == 1:
                continue
            top = max(records, key=lambda record: record.losses[corpus])
            first, last = (record.losses[corpus] for record in (records[0], records[-1]))
            gaps.append(Gap(corpus, domain, top.step, first, top.losses[corpus], last))
    return gaps


def curves_section(results: Results) -> Section:
    """The section of the report, with its tables and picture.

    Args:
        results: with at least one evaluation within a domain.
    """
    ends: list[Row] = [["domain", "steps", "ended", "best step", "goes on with step"]]
    for end in results.ends:
        best = NONE if end.best_step is None else str(end.best_step)
        ends.append([end.domain, str(end.step), end.reason.replace("_", " "), best, str(end.model_step)])
    gaps: list[Row] = [["corpus", "while learning", "at the start", "highest", "at step", "at the end", "gap"]]
    for gap in stability_gaps(results):
        losses = [f"{loss:.4f}" for loss in (gap.start, gap.highest, gap.end)]
        gaps.append([gap.corpus, gap.domain, losses[0], losses[1], str(gap.step), losses[2], f"{gap.height:.4f}"])
    text = (
        "Held-out loss while each domain was learned. Steps are those of the domain; the best one has the lowest loss\n"
        "of the domain itself. Gap: how far the loss of other text rose in between above that at both ends."
    )
    tables = [Table(rows, columns) for rows, columns in ((ends, (0, 2)), (gaps, (0, 1))) if rows[1:]]
    return Section("Within domains", [Text(text), *tables, Plot(Path(CURVES_PLOT).stem, partial(plot_curves, results))])


def plot_curves(results: Results, path: Path) -> None:
    """Plot the held-out loss of every corpus over the steps of the run, with the borders of domains.

    Args:
        results: with at least one evaluation within a domain.
        path: of the PNG file.
    """
    domains = _by_domain(results.evaluations)
    corpora = list(dict.fromkeys(corpus for record in results.evaluations for corpus in record.losses))
    num_rows = -(-len(corpora) // NUM_COLUMNS)
    figure, axes = new_figure(num_rows, NUM_COLUMNS, width=10.0, height=0.6 + 2.3 * num_rows, ratios=(1.0, 1.0))
    plots = [plot for row in axes for plot in row]
    for plot, corpus in zip(plots, corpora, strict=False):
        plot.set_title(corpus, fontsize=9)
        for number, (domain, records) in enumerate(domains.items()):
            _draw_domain(plot, corpus, domain, records, color=f"C{number}")
        plot.grid(alpha=0.25)
    for plot in plots[len(corpora) :]:
        plot.set_axis_off()
    for row in axes:
        row[0].set_ylabel("nats per token")
    for plot in axes[-1]:
        plot.set_xlabel("step of the run")
    figure.savefig(path, dpi=DPI)


def _draw_domain(plot: Axes, corpus: str, domain: str, records: Sequence[DomainEvaluation], *, color: str) -> None:
    """One domain's part of the curve of a corpus, which it may not have, between its borders."""
    steps = [record.global_step for record in records]
    plot.axvline(steps[0], color="0.6", linewidth=0.8, linestyle="--")
    plot.annotate(
        domain,
        (steps[0], 1.0),
        xycoords=("data", "axes fraction"),
        xytext=LABEL_OFFSET,
        textcoords="offset points",
        fontsize=7,
        color=color,
        va="top",
    )
    if corpus in records[0].losses:
        plot.plot(steps, [record.losses[corpus] for record in records], marker=".", color=color)


def _by_domain(evaluations: Sequence[DomainEvaluation]) -> dict[str, list[DomainEvaluation]]:
    domains: dict[str, list[DomainEvaluation]] = {}
    for record in evaluations:
        domains.setdefault(record.domain, []).append(record)
    return domains
