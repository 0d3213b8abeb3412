"""Plots of a run: their values against loops, and the colors of their pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from das_ds.reporting.results import Results
from das_ds.reporting.run_plots import loss_changes, plot_importance, plot_loss_matrix

ResultsMaker = Callable[..., Results]


def pixels(path: Path) -> numpy.ndarray:
    return numpy.asarray(Image.open(path).convert("RGB")).astype(int)


def test_loss_changes_are_relative_to_loss_after_learning(make_results: ResultsMaker) -> None:
    nan = math.nan
    expected = [[nan, nan, nan, 0.0], [0.0, nan, nan, 0.1], [0.6, 0.0, nan, 0.2], [0.7, 0.2, 0.0, 0.4]]
    found = loss_changes(make_results())
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), equal_nan=True)


def test_loss_changes_pool_has_one_reference_row(make_results: ResultsMaker) -> None:
    found = loss_changes(make_results("pool", num_rows=2, learned=[["acl", "pubmed", "restaurant"]]))
    expected = torch.tensor([[math.nan] * 3 + [0.0], [0.0, 0.0, 0.0, 0.1]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize(
    "case", [{}, {"num_rows": 1}, {"num_rows": 2}, {"num_domains": 1, "num_rows": 2, "general": False}]
)
def test_plot_loss_matrix_every_stage_is_drawn(
    make_results: ResultsMaker, tmp_path: Path, case: dict[str, int]
) -> None:
    plot_loss_matrix(make_results(**case), tmp_path / "losses.png")
    assert min(Image.open(tmp_path / "losses.png").size) >= 300


def test_plot_loss_matrix_forgetting_is_red(make_results: ResultsMaker, tmp_path: Path) -> None:
    def num_red(num_rows: int) -> int:
        plot_loss_matrix(make_results(num_rows=num_rows, general=False), tmp_path / "losses.png")
        red, green, _ = pixels(tmp_path / "losses.png").transpose(2, 0, 1)
        return int((red - green > 60).sum())

    nothing_forgotten = num_red(2)
    something_forgotten = num_red(4)
    assert something_forgotten > 2 * nothing_forgotten


def test_plot_importance_saturated_mask_is_dark(tmp_path: Path) -> None:
    def brightness(value: float) -> float:
        plot_importance({"head": torch.full((2, 4), value), "output": torch.full((2, 9), value)}, tmp_path / "mask.png")
        image = pixels(tmp_path / "mask.png")
        return float(image[:, : image.shape[1] // 2].mean())

    assert brightness(0.0) - brightness(1.0) > 80


def test_plot_importance_one_layer_is_drawn(tmp_path: Path) -> None:
    plot_importance({"intermediate": torch.rand(1, 3)}, tmp_path / "mask.png")
    assert (tmp_path / "mask.png").stat().st_size > 0
