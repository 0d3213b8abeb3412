"""Learning curves of a run: training loss over tokens, from metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from das_ds.reporting.run_plots import DPI, new_figure
from das_ds.run_dir import METRICS_FILE
from das_ds.tracking.names import DOMAIN, LOSS, TOKENS_SEEN

MAX_POINTS = 300
"""Per domain; longer curves are means over equally many lines."""

Curve = Sequence[tuple[float, float]]
"""(tokens seen, training loss)."""


def read_learning_curves(run_folder: Path) -> dict[str, Curve]:
    """Domain -> its curve, in the order of training; lines that are damaged or have no finite loss are left out."""
    path = run_folder / METRICS_FILE
    curves: dict[str, list[tuple[float, float]]] = {}
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
            point = (float(line[TOKENS_SEEN]), float(line[LOSS]))
            domain = str(line[DOMAIN])
        except (ValueError, TypeError, KeyError):
            continue
        if math.isfinite(point[1]):
            curves.setdefault(domain, []).append(point)
    return {domain: _thin(points) for domain, points in curves.items()}


def plot_learning_curves(curves: Mapping[str, Curve], path: Path) -> None:
    """Plot the curves one after another, a color for each domain.

    Args:
        curves: at least one.
        path: of the file.
    """
    figure, axes = new_figure(1, 1, width=8.0, height=3.6)
    plot = axes[0][0]
    for domain, points in curves.items():
        plot.plot(*zip(*points, strict=True), linewidth=1.2, label=domain)
    plot.set_xlabel("tokens seen")
    plot.set_ylabel("training loss (nats per token)")
    plot.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=DPI)


def _thin(points: Curve) -> Curve:
    """Means over at most `MAX_POINTS` runs of neighboring points."""
    size = math.ceil(len(points) / MAX_POINTS)
    chunks = [points[first : first + size] for first in range(0, len(points), size)]
    return [tuple(sum(values) / len(chunk) for values in zip(*chunk, strict=True)) for chunk in chunks]
