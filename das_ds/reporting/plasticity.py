"""Plasticity in the report of a run: what each domain found open, and what it left, by kind of layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from das_ds.reporting.document import Bullets, Plot, Section, Table, Text
from das_ds.reporting.run_plots import DPI, new_figure
from das_ds.reporting.tables import Row
from das_ds.run_dir import PLASTICITY_FILE, PLASTICITY_PLOT
from das_ds.softmask.plasticity import DomainPlasticity, PlasticityReading, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NONE = "-"
ALL = "all"
AFTER = "after"
"""Last place of the x axis: what the last domain left."""


def read_plasticity(run_folder: Path) -> list[DomainPlasticity]:
    """Of every domain of a run that has begun, in order; [] for runs that measured none, and for older runs.

    Raises:
        RunFolderError: a file is damaged.
    """
    return [DomainPlasticity.read(path) for path in sorted(run_folder.glob(f"domains/*/{PLASTICITY_FILE}"))]


def format_share(share: float) -> str:
    """`61%`, `4.3%` or `0.02%`: two significant digits below 10 %, three decimals at most."""
    percent = 100 * share
    if percent >= 9.95 or percent == 0.0:
        return f"{percent:.0f}%"
    return f"{percent:.1f}%" if percent >= 0.95 else f"{percent:.2g}%" if percent >= 0.001 else "<0.001%"


def plasticity_section(domains: Sequence[DomainPlasticity]) -> Section:
    """The section of the report, with its table and picture.

    Args:
        domains: at least one.
    """
    header = ["domain", "input of", "open before", "passes before", "open after", "passes after"]
    rows = [row for measured in domains for row in _rows(measured)]
    protections = [
        f"Protected while {measured.domain} is learned: {', '.join(measured.protected)} ({measured.form})."
        for measured in domains
        if measured.protected
    ]
    text = (
        "What earlier domains left free when a domain began, and what was left once it was learned and protected.\n"
        "Open: the share of all input directions along which layers may learn. Passes: the share of the energy of\n"
        "the domain's own inputs that lies there: before, what it could learn by; after, what later domains can still\n"
        "disturb. By kind of layer the median over its inputs, and the least and the most."
    )
    return Section(
        "Plasticity",
        [
            Text(text),
            Table([header, *rows], text_columns=(0, 1)),
            *([Bullets(protections)] if protections else []),
            Plot(Path(PLASTICITY_PLOT).stem, partial(plot_plasticity, domains)),
        ],
    )


def plot_plasticity(domains: Sequence[DomainPlasticity], path: Path) -> None:
    """Plot open directions (left) and passing energy (right) by domain, one line for each kind of layer.

    Args:
        domains: at least one.
        path: of the PNG file.
    """
    figure, axes = new_figure(1, 2, width=9.0, height=3.8, ratios=(1.0, 1.0))
    left, right = axes[0]
    groups = list(dict.fromkeys(group for measured in domains for group in measured.before.groups))
    # A domain begins with the directions that the one before it left.
    last = domains[-1]
    readings = [measured.before for measured in domains] + ([] if last.after is None else [last.after])
    labels = [measured.domain for measured in domains] + ([] if last.after is None else [AFTER])
    for group in groups:
        _draw(left, group, [_median(reading, group, "plasticity") for reading in readings])
        _draw(right, group, [_median(measured.before, group, "passing") for measured in domains])
    for group in groups:
        after = [math.nan if m.after is None else _median(m.after, group, "passing") for m in domains]
        color = left.lines[groups.index(group)].get_color()
        right.plot(range(len(domains)), after, marker="x", linestyle=":", color=color)
    left.set_title("open directions, when the domain begins", fontsize=9)
    right.set_title("energy of its inputs that passes: before (line), after (dotted)", fontsize=9)
    left.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    right.set_xticks(range(len(domains)), [measured.domain for measured in domains], rotation=30, ha="right")
    for plot in (left, right):
        plot.set_ylim(-0.02, 1.02)
        plot.grid(alpha=0.25)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=DPI)


def _rows(measured: DomainPlasticity) -> list[Row]:
    before = measured.before
    after = measured.after
    rows: list[Row] = [
        [
            measured.domain,
            ALL,
            format_share(before.plasticity),
            _share(before.passing),
            NONE if after is None else format_share(after.plasticity),
            NONE if after is None else _share(after.passing),
        ]
    ]
    for name, group in before.groups.items():
        later = None if after is None else after.groups.get(name)
        rows.append(
            [
                "",
                name,
                _spread(group.plasticity),
                _spread(group.passing),
                _spread(None if later is None else later.plasticity),
                _spread(None if later is None else later.passing),
            ]
        )
    return rows


def _share(share: float | None) -> str:
    return NONE if share is None else format_share(share)


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return NONE
    median, least, most = (format_share(share) for share in (spread.median, spread.least, spread.most))
    return median if least == most else f"{median} ({least} to {most})"


def _median(reading: PlasticityReading, group: str, quantity: str) -> float:
    """NaN, to which nothing is drawn, where it was not measured."""
    found = reading.groups.get(group)
    spread: Spread | None = None if found is None else getattr(found, quantity)
    return math.nan if spread is None else spread.median


def _draw(plot: Axes, group: str, values: Sequence[float]) -> None:
    plot.plot(range(len(values)), values, marker="o", label=group)
