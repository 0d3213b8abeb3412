"""The two pictures of a report: the loss matrix and how full the soft mask is. PNG, drawn without a display."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from das_ds.functional.units import UnitValues
from das_ds.reporting.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.ticker import Locator

SMALLEST_COLOUR_RANGE = 0.05
NOT_LEARNED_COLOUR = "0.93"
DPI = 130


def loss_matrix_png(results: Results, path: Path) -> None:
    """Draw the loss matrix: the number is the loss, the colour the change against a reference in the same column.

    Corpora differ in entropy, so colours of absolute losses could not be compared across columns. The reference of a
    domain is the loss right after learning it (framed), that of the general corpus the loss before training; cells
    of a domain that is not learned yet have no reference and stay grey.
    """
    change = changes(results)
    num_rows, num_columns = change.shape
    column_width = max(1.35, 0.1 * max(map(len, results.eval_domains)))
    label_width = 1.6 + 0.1 * max(map(len, results.stages))
    figure, axes = new_figure(
        1, 1, width=max(label_width + column_width * num_columns, 8.0), height=1.9 + 0.62 * num_rows
    )
    plot = axes[0][0]
    limit = max(change.nan_to_num().abs().max().item(), SMALLEST_COLOUR_RANGE)
    plot.set_facecolor(NOT_LEARNED_COLOUR)
    picture = plot.imshow(change.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    plot.set_xticks(range(num_columns), results.eval_domains)
    plot.set_yticks(range(num_rows), results.stages)
    for row, losses in enumerate(results.loss_matrix):
        for column, loss in enumerate(losses):
            _write_cell(plot, row, column, loss, change[row, column].item(), limit)
    _frame_references(plot, results)
    plot.set_title(
        f"Held-out loss of {results.method} (nats per token)\n"
        "colour and small number: change since the framed cell; grey: not learned yet",
        fontsize=9,
    )
    figure.colorbar(picture, ax=plot, label="change (red: forgotten)", fraction=0.05, pad=0.03)
    figure.savefig(path, dpi=DPI)


def changes(results: Results) -> torch.Tensor:
    """Loss minus the reference of its column, (rows, columns) float64; NaN where a domain is not learned yet."""
    return delta_since(torch.tensor(results.loss_matrix, dtype=torch.float64), _reference_rows(results))


def delta_since(losses: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Loss minus the reference of its column, NaN above it.

    Args:
        losses: (rows, columns) float64.
        rows: row of each column's reference.
    """
    change = torch.full_like(losses, torch.nan)
    for column, first in enumerate(rows):
        change[first:, column] = losses[first:, column] - losses[first : first + 1, column]
    return change


def importance_png(importance: UnitValues, path: Path) -> None:
    """Draw, per unit group, the sorted importance of each layer (left) and its mean (right).

    Args:
        importance: unit group -> (L, U) in [0, 1]. A row that is dark over three quarters of its width has a quarter
            of its units left to learn freely.
    """
    figure, axes = new_figure(len(importance), 2, width=8.5, height=0.9 + 2.0 * len(importance), ratios=(4, 1))
    for (sorted_units, means), (group, values) in zip(axes, importance.items(), strict=True):
        picture = _draw_sorted_units(sorted_units, group, values.double())
        _draw_means(means, values.double().mean(dim=1))
    axes[-1][0].set_xlabel("share of units (%)")
    axes[-1][1].set_xlabel("mean importance")
    figure.colorbar(picture, ax=[means for _, means in axes], label="importance", aspect=40, pad=0.03)
    figure.savefig(path, dpi=DPI)


def _draw_sorted_units(plot: Axes, group: str, values: torch.Tensor) -> AxesImage:
    num_layers, num_units = values.shape
    sorted_values = values.sort(dim=1, descending=True).values
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
    """Ticks at whole numbers."""
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
    # The figure is built without pyplot, which would choose a display and keep every figure alive.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False, gridspec_kw={"width_ratios": ratios})
    return figure, [list(row) for row in axes]


def _reference_rows(results: Results) -> list[int]:
    """Row of each column's reference: right after learning a domain, before training for the general corpus."""
    rows = results.rows_learned
    return [rows.get(corpus, 0) for corpus in results.eval_domains]


def _write_cell(plot: Axes, row: int, column: int, loss: float, change: float, limit: float) -> None:
    colour = "white" if abs(change) > 0.6 * limit else "black"
    has_change = not math.isnan(change) and change != 0.0
    plot.text(column, row - 0.13 * has_change, f"{loss:.3f}", ha="center", va="center", color=colour, fontsize=10)
    if has_change:
        plot.text(column, row + 0.24, f"{change:+.3f}", ha="center", va="center", color=colour, fontsize=7.5)


def _frame_references(plot: Axes, results: Results) -> None:
    from matplotlib.patches import Rectangle

    for column, row in enumerate(_reference_rows(results)):
        if row < len(results.loss_matrix):
            plot.add_patch(Rectangle((column - 0.48, row - 0.47), 0.96, 0.94, fill=False, edgecolor="black"))
