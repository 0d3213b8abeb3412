"""Learning against forgetting, a point per group of runs; PNG, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from das_ds.evaluation.comparison import Comparison, Group
from das_ds.evaluation.measures import FORGETTING, LEARNED_LATER, estimate_of, line_groups
from das_ds.evaluation.pictures import DPI, figure_of
from das_ds.functional.intervals import Estimate
from das_ds.functional.pareto import pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TAB = ("blue", "orange", "green", "red", "purple", "brown", "pink", "olive", "cyan")
COLOURS = (*(f"tab:{name}" for name in TAB), "gold", "navy", "lime")
MARKERS = "osD^vP*X<>"
LINE_COLOUR = "0.45"
LEGEND_COLUMNS = 2

Place = tuple[Estimate, Estimate]
"""Loss when learned on domains 2..T, and forgetting."""


def pareto_png(comparison: Comparison, path: Path) -> None:
    """Draw the mean loss right after learning domains 2..T (across) against forgetting (up); down and left is better.

    One colour per method, one marker per group of a method; bars are intervals over seeds, small points the seeds. The
    front joins the groups that no other beats in both. A dashed line joins the groups of the reference that differ in
    how much they learn alone. A method without forgetting is an upright dotted line at its loss.
    """
    figure, axes = figure_of(1, 1, width=8.0, height=5.2 + 0.1 * len(comparison.groups))
    plot = axes[0][0]
    places = {group.label: place for group in comparison.groups if (place := _place(group)) is not None}
    colours = _colours(comparison)
    numbers: dict[str, int] = {}
    for group in comparison.groups:
        number = numbers[group.method] = numbers.get(group.method, -1) + 1
        if group.label in places:
            _draw_group(plot, group, places[group.label], colours[group.method], MARKERS[number % len(MARKERS)])
        elif (learned := estimate_of(group, LEARNED_LATER)) is not None:
            plot.axvline(learned.mean, linestyle=":", color=colours[group.method], label=group.label)
    means = {label: (learned.mean, forgotten.mean) for label, (learned, forgotten) in places.items()}
    _draw_front(plot, list(means.values()))
    line = sorted(means[group.label] for group in line_groups(comparison) if group.label in means)
    if len(line) > 1:
        plot.plot(*zip(*line, strict=True), "--", color=LINE_COLOUR, linewidth=1, zorder=1, label="learning less")
    plot.set_xlabel("mean loss right after learning domains 2..T (nats per token)")
    plot.set_ylabel("average forgetting (nats per token)")
    plot.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=8)
    figure.savefig(path, dpi=DPI)


def _place(group: Group) -> Place | None:
    learned, forgotten = estimate_of(group, LEARNED_LATER), estimate_of(group, FORGETTING)
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
