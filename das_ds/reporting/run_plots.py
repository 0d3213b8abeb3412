"""Plots of one run as PNG files: its loss matrix, and the saturation of its soft mask. They need no display."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from das_ds.functional.units import UnitValues
from das_ds.reporting.results import Results
from das_ds.reporting.transfer import to_matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.ticker import Locator

MIN_COLOR_RANGE = 0.05
"""Nats; smaller changes would otherwise get the strongest color."""
NOT_LEARNED_COLOR = "0.93"
DPI = 130


def plot_loss_matrix(results: Results, path: Path) -> None:
    """Plot the loss matrix: the number is the loss, the color its change relative to a reference in the same column.

    Corpora differ in entropy, so absolute losses cannot share a color scale. The reference of a domain is its loss
    right after learning (framed); that of other corpora is their loss before training. Cells of a domain that is
    not learned yet are gray; one that was not measured is empty.
    """
    change = loss_changes(results)
    num_rows, num_columns = change.shape
    column_width = max(1.35, 0.1 * max(map(len, results.eval_domains)))
    label_width = 1.6 + 0.1 * max(map(len, results.stages))
    figure, axes = new_figure(
        1, 1, width=max(label_width + column_width * num_columns, 8.0), height=1.9 + 0.62 * num_rows
    )
    plot = axes[0][0]
    limit = max(change.nan_to_num().abs().max().item(), MIN_COLOR_RANGE)
    plot.set_facecolor(NOT_LEARNED_COLOR)
    image = plot.imshow(change.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    plot.set_xticks(range(num_columns), results.eval_domains)
    plot.set_yticks(range(num_rows), results.stages)
    for row, losses in enumerate(results.loss_matrix):
        for column, loss in enumerate(losses):
            if loss is not None:
                _write_cell(plot, row, column, loss, change[row, column].item(), limit)
    _frame_references(plot, results)
    plot.set_title(
        f"Held-out loss of {results.method} (nats per token)\n"
        "color and small number: change since the framed cell; gray: not learned yet",
        fontsize=9,
    )
    figure.colorbar(image, ax=plot, label="change (red: forgotten)", fraction=0.05, pad=0.03)
    figure.savefig(path, dpi=DPI)


def loss_changes(results: Results) -> torch.Tensor:
    """Loss minus the reference of its column, (rows, columns) float64; NaN where a domain is not learned yet."""
    return delta_since(to_matrix(results.loss_matrix), _reference_rows(results))


def delta_since(losses: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Loss minus the reference of its column, NaN above it.

    Args:
        losses: (rows, columns) float64.
        rows: row of each column's reference.
    """
    change = torch.full_like(losses, torch.nan)
    for column, row in enumerate(rows):
        # A slice, since the row may not exist yet.
        change[row:, column] = losses[row:, column] - losses[row : row + 1, column]
    return change


def plot_importance(importance: UnitValues, path: Path) -> None:
    """Plot, per unit group, the sorted importance of each layer (left) and its mean (right).

    Args:
        importance: unit group -> (L, U) in [0, 1]. A row that is dark over three quarters of its width leaves a quarter
            of its units free to learn.
    """
    figure, axes = new_figure(len(importance), 2, width=8.5, height=0.9 + 2.0 * len(importance), ratios=(4, 1))
    for (sorted_units, means), (group, values) in zip(axes, importance.items(), strict=True):
        image = _draw_sorted_units(sorted_units, group, values.double())
        _draw_means(means, values.double().mean(dim=1))
    axes[-1][0].set_xlabel("share of units (%)")
    axes[-1][1].set_xlabel("mean importance")
    figure.colorbar(image, ax=[means for _, means in axes], label="importance", aspect=40, pad=0.03)
    figure.savefig(path, dpi=DPI)


def _draw_sorted_units(plot: Axes, group: str, values: torch.Tensor) -> AxesImage:
    num_layers, num_units = values.shape
    sorted_values = values.sort(dim=1, descending=True).values
    # x in percent of units, y one row per layer, counted from 1 at the top.
    extent = (0.0, 100.0, num_layers + 0.5, 0.5)
    plot.set_title(f"{group}: {num_units} units per layer, most important first", fontsize=9)
    plot.set_ylabel("layer")
    plot.yaxis.set_major_locator(integer_ticks())
    return plot.imshow(
        sorted_values.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", extent=extent, interpolation="nearest"
    )


def _draw_means(plot: Axes, means: torch.Tensor) -> None:
    num_layers = len(means)
    plot.barh(range(1, num_layers + 1), means.numpy(), height=0.8, color="0.5")
    plot.set_ylim(num_layers + 0.5, 0.5)
    plot.set_xlim(0, 1)
    plot.set_title(f"mean {means.mean().item():.2f}", fontsize=9)
    plot.yaxis.set_major_locator(integer_ticks())


def integer_ticks() -> Locator:
    """Axis ticks at integers only."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, min_n_ticks=1)


def new_figure(
    num_rows: int, num_columns: int, *, width: float, height: float, ratios: tuple[float, ...] = (1.0,)
) -> tuple[Figure, list[list[Axes]]]:
    """A figure and its axes, row by row.

    Args:
        num_rows, num_columns: of the axes.
        width, height: in inches.
        ratios: widths of the columns.
    """
    # Built without pyplot, which would choose a display and keep every figure alive.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False, gridspec_kw={"width_ratios": ratios})
    return figure, [list(row) for row in axes]


def _reference_rows(results: Results) -> list[int]:
    """For each column, the row that changes are relative to: right after learning; other corpora: row 0."""
    rows = results.rows_learned
    return [rows.get(corpus, 0) for corpus in results.eval_domains]


def _write_cell(plot: Axes, row: int, column: int, loss: float, change: float, limit: float) -> None:
    color = "white" if abs(change) > 0.6 * limit else "black"
    has_change = not math.isnan(change) and change != 0.0
    # The loss moves up to make room for the change below it.
    plot.text(column, row - 0.13 * has_change, f"{loss:.3f}", ha="center", va="center", color=color, fontsize=10)
    if has_change:
        plot.text(column, row + 0.24, f"{change:+.3f}", ha="center", va="center", color=color, fontsize=7.5)


def _frame_references(plot: Axes, results: Results) -> None:
    from matplotlib.patches import Rectangle

    for column, row in enumerate(_reference_rows(results)):
        if row < len(results.loss_matrix):
            plot.add_patch(Rectangle((column - 0.48, row - 0.47), 0.96, 0.94, fill=False, edgecolor="black"))
