"""Evaluations within domains in the report of a run: gaps, tables, picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from PIL import Image

from das_ds.checkpoint.manifest import DomainEnd, DomainEvaluation
from das_ds.reporting.curves import _draw_domain, curves_section, plot_curves, stability_gaps
from das_ds.reporting.document import section_markdown
from das_ds.reporting.results import Results
from das_ds.reporting.run_plots import new_figure
from das_ds.reporting.run_report import report_text, write_report

ResultsMaker = Callable[..., Results]


def record(domain: str, step: int, global_step: int, **losses: float) -> DomainEvaluation:
    return DomainEvaluation(domain=domain, step=step, global_step=global_step, losses=losses)


EVALUATIONS = [
    record("acl", 0, 0, acl=6.0, general=3.0),
    record("acl", 10, 10, acl=4.0, general=3.1),
    record("pubmed", 0, 10, acl=4.0, pubmed=4.5, general=3.1),
    record("pubmed", 4, 14, acl=5.0, pubmed=3.0, general=3.05),
    record("pubmed", 8, 18, acl=4.6, pubmed=2.0, general=3.2),
]
ENDS = [
    DomainEnd(domain="acl", reason="steps", step=10, best_step=10, model_step=10),
    DomainEnd(domain="pubmed", reason="max_forgetting", step=8, best_step=None, model_step=0),
]


@pytest.fixture
def results(make_results: ResultsMaker) -> Results:
    return make_results(num_rows=3, num_domains=2).model_copy(update={"evaluations": EVALUATIONS, "ends": ENDS})


def test_results_keep_evaluations_and_ends(results: Results, tmp_path: Path) -> None:
    results.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == results


def test_stability_gap_is_what_other_text_loses_in_between(results: Results) -> None:
    gaps = {(gap.domain, gap.corpus): gap for gap in stability_gaps(results)}
    assert gaps.keys() == {("acl", "general"), ("pubmed", "acl"), ("pubmed", "general")}
    acl = gaps["pubmed", "acl"]
    assert (acl.step, acl.start, acl.highest, acl.end) == (4, 4.0, 5.0, 4.6)
    # Above both ends, the higher of which is what was forgotten in the end.
    assert acl.height == pytest.approx(0.4)
    assert gaps["acl", "general"].height == gaps["pubmed", "general"].height == 0.0


def test_domain_that_has_just_begun_has_no_gap(results: Results) -> None:
    begun = results.model_copy(update={"evaluations": EVALUATIONS[:3], "ends": ENDS[:1]})
    assert [gap.domain for gap in stability_gaps(begun)] == ["acl"]
    started = results.model_copy(update={"evaluations": EVALUATIONS[:1], "ends": []})
    text = section_markdown(curves_section(started))
    assert "(curves.png)" in text and "|" not in text


def test_curves_section_has_all_values(results: Results) -> None:
    lines = section_markdown(curves_section(results)).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert ["acl", "10", "steps", "10", "10"] in rows
    assert ["pubmed", "8", "max forgetting", "-", "0"] in rows
    assert ["acl", "pubmed", "4.0000", "5.0000", "4", "4.6000", "0.4000"] in rows


def test_report_has_curves_only_with_evaluations(results: Results, tmp_path: Path) -> None:
    folder = write_report(tmp_path, results, None)
    assert sorted(path.name for path in folder.iterdir()) == [
        "curves.png",
        "index.html",
        "loss_matrix.png",
        "report.md",
    ]
    assert "## Within domains" in (folder / "report.md").read_text()
    assert "Within domains" not in report_text(results.model_copy(update={"evaluations": []}), None)


def test_names_of_domains_are_within_the_plot() -> None:
    figure, axes = new_figure(1, 1, width=5.0, height=2.3)
    plot = axes[0][0]
    _draw_domain(plot, "acl", "acl", EVALUATIONS[:2], color="C0")
    figure.draw_without_rendering()
    (label,) = plot.texts
    name, frame = label.get_window_extent(), plot.get_window_extent()
    # The frame and the border of the domain are lines of about a point.
    assert frame.x0 + 1 < name.x0 and name.y1 < frame.y1 - 1


def test_plot_curves_draws_every_domain_in_its_own_color(results: Results, tmp_path: Path) -> None:
    plot_curves(results, tmp_path / "curves.png")
    pixels = numpy.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).reshape(-1, 3)
    colors = {tuple(color) for color in numpy.unique(pixels, axis=0).tolist()}
    # C0 and C1 of matplotlib.
    assert {(31, 119, 180), (255, 127, 14)} <= colors
