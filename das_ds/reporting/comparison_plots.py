"""Plots of a comparison as PNG files: learning against forgetting, loss matrices, importance overlap, mask saturation.

They are drawn without a display.
"""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from das_ds.reporting.comparison import Comparison, Group, ImportanceSummary, Matrix
from das_ds.reporting.comparison_tables import importance_by_group, mean_losses
from das_ds.reporting.metrics import FORGETTING, LOSS_AFTER_LEARNING_LATER, baseline_sweep, estimate_metric
from das_ds.reporting.run_plots import (
    DPI,
    MIN_COLOR_RANGE,
    NOT_LEARNED_COLOR,
    delta_since,
    integer_ticks,
    new_figure,
)
from das_ds.reporting.statistics import Estimate, pareto_front
from das_ds.reporting.transfer import to_matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

MAX_COLUMNS = 3
LEGEND_COLUMNS = 2
TITLE_WIDTH = 26
"""Characters."""
DARK = 0.6
"""Fraction of the color range above which text is white."""
TAB = ("blue", "orange", "green", "red", "purple", "brown", "pink", "olive", "cyan")
COLORS = (*(f"tab:{name}" for name in TAB), "gold", "navy", "lime")
MARKERS = "osD^vP*X<>"
SWEEP_COLOR = "0.45"

LearningAndForgetting = tuple[Estimate, Estimate]
"""Loss after learning (2..T), and forgetting: the coordinates of a group in the Pareto plot."""


def plot_pareto(comparison: Comparison, path: Path) -> None:
    """Plot the mean loss after learning domains 2..T (x) against forgetting (y); lower left is better.

    Each method has a color and each of its groups a marker. Bars are intervals over seeds, small dots single seeds. The
    Pareto front joins the groups that no other group beats in both coordinates. A dashed line joins the groups of
    `baseline_sweep`. A method for which forgetting is undefined is a vertical dotted line at its loss.
    """
    figure, axes = new_figure(1, 1, width=8.0, height=5.2 + 0.1 * len(comparison.groups))
    plot = axes[0][0]
    points = {group.label: point for group in comparison.groups if (point := _learning_and_forgetting(group))}
    colors = _method_colors(comparison)
    num_groups: dict[str, int] = {}
    for group in comparison.groups:
        index = num_groups.get(group.method, 0)
        num_groups[group.method] = index + 1
        if group.label in points:
            _draw_group(plot, group, points[group.label], colors[group.method], MARKERS[index % len(MARKERS)])
        elif (loss := estimate_metric(group, LOSS_AFTER_LEARNING_LATER)) is not None:
            plot.axvline(loss.mean, linestyle=":", color=colors[group.method], label=group.label)
    means = {label: (loss.mean, forgetting.mean) for label, (loss, forgetting) in points.items()}
    _draw_front(plot, list(means.values()))
    sweep = sorted(means[group.label] for group in baseline_sweep(comparison) if group.label in means)
    if len(sweep) > 1:
        plot.plot(*zip(*sweep, strict=True), "--", color=SWEEP_COLOR, linewidth=1, zorder=1, label="learning less")
    plot.set_xlabel("mean loss after learning domains 2..T (nats per token)")
    plot.set_ylabel("average forgetting (nats per token)")
    plot.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=8)
    figure.savefig(path, dpi=DPI)


def plot_loss_matrices(comparison: Comparison, path: Path) -> None:
    """Plot each group's loss matrix, averaged over seeds, all on one color scale.

    The number is the loss. The color is the change since the domain was learned (other corpora: since before
    training): red is forgotten, blue is better, gray is not learned yet.
    """
    means = [to_matrix(mean_losses(group)) for group in comparison.groups]
    changes = [
        delta_since(losses, _reference_rows(comparison, group))
        for losses, group in zip(means, comparison.groups, strict=True)
    ]
    limit = max(MIN_COLOR_RANGE, *(change.nan_to_num().abs().max().item() for change in changes))
    num_columns = min(MAX_COLUMNS, len(changes))
    num_rows = math.ceil(len(changes) / num_columns)
    max_stages = max(len(group.stages) for group in comparison.groups)
    figure, axes = new_figure(
        num_rows,
        num_columns,
        width=max(1.6 + num_columns * (1.2 + 0.62 * len(comparison.eval_domains)), 6.0),
        height=0.4 + num_rows * (1.5 + 0.36 * max_stages),
        ratios=(1.0,) * num_columns,
    )
    plots = [plot for row in axes for plot in row]
    # The grid may have more plots than there are groups.
    for plot, losses, change, group in zip(plots, means, changes, comparison.groups, strict=False):
        plot.set_facecolor(NOT_LEARNED_COLOR)
        image = plot.imshow(change.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        _label_cells(plot, comparison.eval_domains, group.stages)
        for (row, column), loss in _cells(losses.tolist()):
            if math.isnan(loss):
                continue
            is_dark = abs(change[row, column].nan_to_num().item()) > DARK * limit
            _write_cell(plot, row, column, f"{loss:.3f}", is_dark=is_dark)
        plot.set_title(_wrap_title(group.label), fontsize=8)
    for plot in plots[len(changes) :]:
        plot.set_axis_off()
    figure.colorbar(image, ax=plots, label="change (red: forgotten)", fraction=0.04, pad=0.02)
    figure.savefig(path, dpi=DPI)


def plot_overlap(comparison: Comparison, path: Path) -> None:
    """Plot which sources claim the same units: one row per group of runs, one column per unit group.

    Means over seeds. Color and number: Jaccard index; on the diagonal: fraction of units that the source claims; second
    number: cosine.
    """
    importance = importance_by_group(comparison)
    names = _unit_groups(importance)
    num_sources = max(len(runs[0].sources) for runs in importance.values())
    side = 1.1 + 0.55 * num_sources
    figure, axes = new_figure(
        len(importance),
        len(names),
        width=1.2 + side * len(names),
        height=0.5 + (side + 0.3) * len(importance),
        ratios=(1.0,) * len(names),
    )
    for row, (label, runs) in zip(axes, importance.items(), strict=True):
        for plot, name in zip(row, names, strict=True):
            if name not in runs[0].groups:
                plot.set_axis_off()
                continue
            image = _draw_overlap(plot, runs, name)
            plot.set_title(f"{_wrap_title(label)}\n{name}", fontsize=7)
    figure.colorbar(image, ax=[plot for row in axes for plot in row], label="Jaccard", fraction=0.04, pad=0.02)
    figure.savefig(path, dpi=DPI)


def plot_mask_saturation(comparison: Comparison, path: Path) -> None:
    """Plot mean accumulated importance by layer: one plot per unit group, one line per group of runs."""
    importance = importance_by_group(comparison)
    names = _unit_groups(importance)
    figure, axes = new_figure(
        1, len(names), width=0.8 + 2.6 * len(names), height=3.0 + 0.1 * len(importance), ratios=(1.0,) * len(names)
    )
    for plot, name in zip(axes[0], names, strict=True):
        max_layers = 0
        for index, (label, runs) in enumerate(importance.items()):
            if name in runs[0].groups:
                layers = _mean([[run.groups[name].mask_saturation] for run in runs])[0]
                plot.plot(range(1, len(layers) + 1), layers, "o-", color=f"C{index}", markersize=4, label=label)
                max_layers = max(max_layers, len(layers))
        plot.set_ylim(0, 1)
        plot.set_xlim(0.5, 0.5 + max_layers)
        plot.set_title(name, fontsize=9)
        plot.set_xlabel("layer")
        plot.xaxis.set_major_locator(integer_ticks())
        plot.grid(alpha=0.25)
    axes[0][0].set_ylabel("mean importance (1: no capacity left)")
    # A group may be missing from some plots, so the legend collects the lines of all.
    handles = {text: line for plot in axes[0] for line, text in zip(*plot.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=8)
    figure.savefig(path, dpi=DPI)


def _learning_and_forgetting(group: Group) -> LearningAndForgetting | None:
    loss = estimate_metric(group, LOSS_AFTER_LEARNING_LATER)
    forgetting = estimate_metric(group, FORGETTING)
    return None if loss is None or forgetting is None else (loss, forgetting)


def _method_colors(comparison: Comparison) -> dict[str, str]:
    methods = dict.fromkeys(group.method for group in comparison.groups)
    return {method: COLORS[index % len(COLORS)] for index, method in enumerate(methods)}


def _draw_group(plot: Axes, group: Group, point: LearningAndForgetting, color: str, marker: str) -> None:
    loss, forgetting = point
    seeds = [(run.loss_after_learning_later, run.forgetting) for run in group.runs if run.forgetting is not None]
    if len(seeds) > 1:
        x_values, y_values = zip(*seeds, strict=True)
        plot.scatter(x_values, y_values, s=9, color=color, alpha=0.45, linewidths=0, zorder=2)
    plot.errorbar(
        loss.mean,
        forgetting.mean,
        xerr=_error_bar(loss),
        yerr=_error_bar(forgetting),
        fmt=marker,
        color=color,
        capsize=3,
        markersize=7,
        elinewidth=1,
        zorder=3,
        label=group.label,
    )


def _error_bar(estimate: Estimate) -> list[list[float]] | None:
    """Lengths below and above the mean, as matplotlib's `errorbar` takes them."""
    if estimate.low is None or estimate.high is None:
        return None
    return [[max(estimate.mean - estimate.low, 0.0)], [max(estimate.high - estimate.mean, 0.0)]]


def _draw_front(plot: Axes, means: list[tuple[float, float]]) -> None:
    front = [means[index] for index in pareto_front(means)] if means else []
    if len(front) > 1:
        plot.step(*zip(*front, strict=True), where="post", color="black", linewidth=1, zorder=1, label="Pareto front")


def _draw_overlap(plot: Axes, runs: list[ImportanceSummary], name: str) -> AxesImage:
    overlaps = [run.groups[name] for run in runs]
    jaccard = _mean([overlap.jaccard for overlap in overlaps])
    cosine = _mean([overlap.cosine for overlap in overlaps])
    claimed = _mean([[overlap.claimed] for overlap in overlaps])[0]
    image = plot.imshow(jaccard, cmap="Blues", vmin=0, vmax=1)
    _label_cells(plot, runs[0].sources, runs[0].sources)
    for (row, column), value in _cells(jaccard):
        text = f"{claimed[row]:.0%}" if row == column else f"{value:.2f}\n{cosine[row][column]:.2f}"
        _write_cell(plot, row, column, text, is_dark=value > DARK)
    return image


def _reference_rows(comparison: Comparison, group: Group) -> list[int]:
    """For each column, the row that changes are relative to: right after learning; other corpora: row 0."""
    learned = group.runs[0].learned_rows
    return [*learned, *[0] * (len(comparison.eval_domains) - len(learned))]


def _unit_groups(importance: dict[str, list[ImportanceSummary]]) -> list[str]:
    return list(dict.fromkeys(name for runs in importance.values() for name in runs[0].groups))


def _mean(matrices: list[Matrix]) -> Matrix:
    mean: Matrix = torch.tensor(matrices, dtype=torch.float64).mean(dim=0).tolist()
    return mean


def _wrap_title(label: str) -> str:
    return textwrap.fill(label, TITLE_WIDTH)


def _label_cells(plot: Axes, columns: list[str], rows: list[str]) -> None:
    plot.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=7)
    plot.set_yticks(range(len(rows)), rows, fontsize=7)


def _cells(matrix: Matrix) -> list[tuple[tuple[int, int], float]]:
    return [((row, column), value) for row, values in enumerate(matrix) for column, value in enumerate(values)]


def _write_cell(plot: Axes, row: int, column: int, text: str, *, is_dark: bool) -> None:
    plot.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if is_dark else "black")
