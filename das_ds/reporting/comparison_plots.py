"""Pictures of a comparison, small ones side by side: loss matrices, overlap of importance, how full the mask is.

Learning against forgetting, a point per group of runs; PNG, drawn without a display.
"""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from das_ds.reporting.comparison import Comparison, Group, ImportanceNumbers, Matrix
from das_ds.reporting.comparison_tables import mean_losses, with_importance
from das_ds.reporting.metrics import FORGETTING, LEARNED_LATER, baseline_sweep, estimate_metric
from das_ds.reporting.run_plots import (
    DPI,
    NOT_LEARNED_COLOUR,
    SMALLEST_COLOUR_RANGE,
    delta_since,
    integer_ticks,
    new_figure,
)
from das_ds.reporting.statistics import Estimate, pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

MOST_COLUMNS = 3
LEGEND_COLUMNS = 2
TITLE_WIDTH = 26
"""Letters."""
DARK = 0.6
"""Share of the colour range from which text is white."""


def loss_matrices_png(comparison: Comparison, path: Path) -> None:
    """Draw each group's loss matrix, mean over seeds, all in one range of colours.

    The number is the loss; the colour is the change since the domain was learned, of the general corpus since before
    training: red is forgotten, blue is better, grey is not learned yet.
    """
    means = [torch.tensor(mean_losses(group), dtype=torch.float64) for group in comparison.groups]
    changes = [
        delta_since(losses, _reference_rows(comparison, group))
        for losses, group in zip(means, comparison.groups, strict=True)
    ]
    limit = max(SMALLEST_COLOUR_RANGE, *(change.nan_to_num().abs().max().item() for change in changes))
    num_columns = min(MOST_COLUMNS, len(changes))
    num_rows = math.ceil(len(changes) / num_columns)
    most_stages = max(len(group.stages) for group in comparison.groups)
    figure, axes = new_figure(
        num_rows,
        num_columns,
        width=max(1.6 + num_columns * (1.2 + 0.62 * len(comparison.eval_domains)), 6.0),
        height=0.4 + num_rows * (1.5 + 0.36 * most_stages),
        ratios=(1.0,) * num_columns,
    )
    plots = [plot for row in axes for plot in row]
    for plot, losses, change, group in zip(plots, means, changes, comparison.groups, strict=False):
        plot.set_facecolor(NOT_LEARNED_COLOUR)
        picture = plot.imshow(change.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        _name_cells(plot, comparison.eval_domains, group.stages)
        for (row, column), loss in _cells(losses.tolist()):
            is_dark = abs(change[row, column].nan_to_num().item()) > DARK * limit
            _write(plot, row, column, f"{loss:.3f}", is_dark=is_dark)
        plot.set_title(_title(group.label), fontsize=8)
    for plot in plots[len(changes) :]:
        plot.set_axis_off()
    figure.colorbar(picture, ax=plots, label="change (red: forgotten)", fraction=0.04, pad=0.02)
    figure.savefig(path, dpi=DPI)


def overlap_png(comparison: Comparison, path: Path) -> None:
    """Draw which sources claim the same units: a row per group of runs, a column per unit group, means over seeds.

    Colour and number: Jaccard; on the diagonal: the share of units that the source claims; small: cosine.
    """
    found = with_importance(comparison)
    names = _unit_groups(found)
    num_sources = max(len(runs[0].sources) for runs in found.values())
    side = 1.1 + 0.55 * num_sources
    figure, axes = new_figure(
        len(found),
        len(names),
        width=1.2 + side * len(names),
        height=0.5 + (side + 0.3) * len(found),
        ratios=(1.0,) * len(names),
    )
    for row, (label, runs) in zip(axes, found.items(), strict=True):
        for plot, name in zip(row, names, strict=True):
            if name not in runs[0].groups:
                plot.set_axis_off()
                continue
            picture = _draw_overlap(plot, runs, name)
            plot.set_title(f"{_title(label)}\n{name}", fontsize=7)
    figure.colorbar(picture, ax=[plot for row in axes for plot in row], label="Jaccard", fraction=0.04, pad=0.02)
    figure.savefig(path, dpi=DPI)


def mask_saturation_png(comparison: Comparison, path: Path) -> None:
    """Draw mean accumulated importance by layer, a line per group of runs, side by side for the unit groups."""
    found = with_importance(comparison)
    names = _unit_groups(found)
    figure, axes = new_figure(
        1, len(names), width=0.8 + 2.6 * len(names), height=3.0 + 0.1 * len(found), ratios=(1.0,) * len(names)
    )
    for plot, name in zip(axes[0], names, strict=True):
        for number, (label, runs) in enumerate(found.items()):
            if name in runs[0].groups:
                layers = _mean([[run.groups[name].fullness] for run in runs])[0]
                plot.plot(range(1, len(layers) + 1), layers, "o-", color=f"C{number}", markersize=4, label=f"{label}")
        plot.set_ylim(0, 1)
        plot.set_xlim(
            0.5, 0.5 + max(len(runs[0].groups[name].fullness) for runs in found.values() if name in runs[0].groups)
        )
        plot.set_title(name, fontsize=9)
        plot.set_xlabel("layer")
        plot.xaxis.set_major_locator(integer_ticks())
        plot.grid(alpha=0.25)
    axes[0][0].set_ylabel("mean importance (1: nothing left)")
    handles = {text: line for plot in axes[0] for line, text in zip(*plot.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=8)
    figure.savefig(path, dpi=DPI)


def _draw_overlap(plot: Axes, runs: list[ImportanceNumbers], name: str) -> AxesImage:
    groups = [run.groups[name] for run in runs]
    jaccard, cosine = _mean([group.jaccard for group in groups]), _mean([group.cosine for group in groups])
    claimed = _mean([[group.claimed] for group in groups])[0]
    picture = plot.imshow(jaccard, cmap="Blues", vmin=0, vmax=1)
    _name_cells(plot, runs[0].sources, runs[0].sources)
    for (row, column), value in _cells(jaccard):
        text = f"{claimed[row]:.0%}" if row == column else f"{value:.2f}\n{cosine[row][column]:.2f}"
        _write(plot, row, column, text, is_dark=value > DARK)
    return picture


def _reference_rows(comparison: Comparison, group: Group) -> list[int]:
    """Row of each column's reference: right after learning a domain, before training for the general corpus."""
    learned = group.runs[0].learned_rows
    return [*learned, *[0] * (len(comparison.eval_domains) - len(learned))]


def _unit_groups(found: dict[str, list[ImportanceNumbers]]) -> list[str]:
    return list(dict.fromkeys(name for runs in found.values() for name in runs[0].groups))


def _mean(matrices: list[Matrix]) -> Matrix:
    values: Matrix = torch.tensor(matrices, dtype=torch.float64).mean(dim=0).tolist()
    return values


def _title(label: str) -> str:
    """A label that is as wide as a small picture."""
    return textwrap.fill(label, TITLE_WIDTH)


def _name_cells(plot: Axes, columns: list[str], rows: list[str]) -> None:
    plot.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=7)
    plot.set_yticks(range(len(rows)), rows, fontsize=7)


def _cells(matrix: Matrix) -> list[tuple[tuple[int, int], float]]:
    return [((row, column), value) for row, values in enumerate(matrix) for column, value in enumerate(values)]


def _write(plot: Axes, row: int, column: int, text: str, *, is_dark: bool) -> None:
    plot.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if is_dark else "black")


if TYPE_CHECKING:
    from matplotlib.axes import Axes

TAB = ("blue", "orange", "green", "red", "purple", "brown", "pink", "olive", "cyan")
COLOURS = (*(f"tab:{name}" for name in TAB), "gold", "navy", "lime")
MARKERS = "osD^vP*X<>"
LINE_COLOUR = "0.45"

Place = tuple[Estimate, Estimate]
"""Loss when learned on domains 2..T, and forgetting."""


def pareto_png(comparison: Comparison, path: Path) -> None:
    """Draw the mean loss right after learning domains 2..T (across) against forgetting (up); down and left is better.

    One colour per method, one marker per group of a method; bars are intervals over seeds, small points the seeds. The
    front joins the groups that no other beats in both. A dashed line joins the groups of the reference that differ in
    how much they learn alone. A method without forgetting is an upright dotted line at its loss.
    """
    figure, axes = new_figure(1, 1, width=8.0, height=5.2 + 0.1 * len(comparison.groups))
    plot = axes[0][0]
    places = {group.label: place for group in comparison.groups if (place := _place(group)) is not None}
    colours = _colours(comparison)
    numbers: dict[str, int] = {}
    for group in comparison.groups:
        number = numbers[group.method] = numbers.get(group.method, -1) + 1
        if group.label in places:
            _draw_group(plot, group, places[group.label], colours[group.method], MARKERS[number % len(MARKERS)])
        elif (learned := estimate_metric(group, LEARNED_LATER)) is not None:
            plot.axvline(learned.mean, linestyle=":", color=colours[group.method], label=group.label)
    means = {label: (learned.mean, forgotten.mean) for label, (learned, forgotten) in places.items()}
    _draw_front(plot, list(means.values()))
    line = sorted(means[group.label] for group in baseline_sweep(comparison) if group.label in means)
    if len(line) > 1:
        plot.plot(*zip(*line, strict=True), "--", color=LINE_COLOUR, linewidth=1, zorder=1, label="learning less")
    plot.set_xlabel("mean loss right after learning domains 2..T (nats per token)")
    plot.set_ylabel("average forgetting (nats per token)")
    plot.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=8)
    figure.savefig(path, dpi=DPI)


def _place(group: Group) -> Place | None:
    learned, forgotten = estimate_metric(group, LEARNED_LATER), estimate_metric(group, FORGETTING)
    return None if learned is None or forgotten is None else (learned, forgotten)


def _colours(comparison: Comparison) -> dict[str, str]:
    methods = dict.fromkeys(group.method for group in comparison.groups)
    return {method: COLOURS[number % len(COLOURS)] for number, method in enumerate(methods)}


def _draw_group(plot: Axes, group: Group, place: Place, colour: str, marker: str) -> None:
    across, up = place
    seeds = [(run.learned_later, run.forgetting) for run in group.runs if run.forgetting is not None]
    if len(seeds) > 1:
        across_seeds, up_seeds = zip(*seeds, strict=True)
        plot.scatter(across_seeds, up_seeds, s=9, color=colour, alpha=0.45, linewidths=0, zorder=2)
    plot.errorbar(
        across.mean,
        up.mean,
        xerr=_arms(across),
        yerr=_arms(up),
        fmt=marker,
        color=colour,
        capsize=3,
        markersize=7,
        elinewidth=1,
        zorder=3,
        label=group.label,
    )


def _arms(found: Estimate) -> list[list[float]] | None:
    """Lengths of an error bar below and above the mean."""
    if found.low is None or found.high is None:
        return None
    return [[max(found.mean - found.low, 0.0)], [max(found.high - found.mean, 0.0)]]


def _draw_front(plot: Axes, means: list[tuple[float, float]]) -> None:
    front = [means[position] for position in pareto_front(means)] if means else []
    if len(front) > 1:
        plot.step(*zip(*front, strict=True), where="post", color="black", linewidth=1, zorder=1, label="Pareto front")
