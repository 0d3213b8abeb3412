"""The report of a comparison: files, text, and pixels of its plots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from PIL import Image

from das_ds.errors import RunFolderError
from das_ds.reporting.comparison import Comparison
from das_ds.reporting.comparison_plots import plot_loss_matrices, plot_mask_saturation, plot_overlap, plot_pareto
from das_ds.reporting.comparison_report import report_text, write_comparison_report
from das_ds.reporting.comparison_tables import stage_rows
from das_ds.run_dir import COMPARISON_FILE, HTML_REPORT_FILE, REPORT_FILE
from helpers.comparisons import comparison, group, importance_summary, pooled

NCL = group("ncl", [(3.0, 0.9), (3.2, 0.7)], train__learning_rate="1e-3")
SLOW = group("ncl slow", [(4.0, 0.5), (4.2, 0.3)], train__learning_rate="3e-4")
DAS = group("das", [(3.5, 0.6), (3.7, 0.3)], importance=importance_summary(), train__learning_rate="1e-3")


def pixels(draw: Callable[[Comparison, Path], None], comparison: Comparison, folder: Path) -> numpy.ndarray:
    draw(comparison, folder / "plot.png")
    return numpy.asarray(Image.open(folder / "plot.png").convert("RGB")).astype(int)


def test_write_report_from_stored_comparison_is_identical(tmp_path: Path) -> None:
    drawn = write_comparison_report(comparison(NCL, SLOW, DAS, pooled("pool", [2.5])), tmp_path / "new" / "first")
    assert sorted(drawn) == ["loss_matrices", "mask_saturation", "overlap", "pareto"]
    write_comparison_report(Comparison.read(tmp_path / "new" / "first" / COMPARISON_FILE), tmp_path / "second")
    names = {path.name for path in drawn.values()} | {COMPARISON_FILE, REPORT_FILE, HTML_REPORT_FILE}
    for folder in (tmp_path / "new" / "first", tmp_path / "second"):
        assert {path.name for path in folder.iterdir()} == names
    for name in names:
        assert (tmp_path / "new" / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_report_text_has_all_sections() -> None:
    text = report_text(comparison(NCL, SLOW, DAS, notes=["x/y is not complete and is omitted."]))
    assert "# Runs over acl -> pubmed" in text
    assert "With 2 seeds it is wide" in text
    assert "## Compared with ncl\n" in text and "## Compared at equal learning\n" in text
    assert "Without importance files, omitted here: ncl, ncl slow." in text
    assert "## Notes\n\n- x/y is not complete and is omitted.\n" in text
    assert "## End tasks" not in text
    assert all(f"({name}.png)" in text for name in ("pareto", "loss_matrices", "mask_saturation", "overlap"))


def test_report_text_one_seed_claims_nothing() -> None:
    text = report_text(comparison(group("ncl", [(3.0, 0.5)])))
    assert "One seed per group: no confidence interval" in text
    assert "## Compared" not in text and "## Notes" not in text
    assert "Omitted: no run has importance files." in text
    assert "mask_saturation.png" not in text and "overlap.png" not in text


def test_explain_intervals_six_seeds_has_no_warning() -> None:
    text = report_text(comparison(group("ncl", [(3.0 + 0.1 * seed, 0.5) for seed in range(6)])))
    assert "In brackets: 95 % t interval" in text and "it is wide" not in text


def test_write_report_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=r"--output .*file: cannot be written \(File exists"):
        write_comparison_report(comparison(NCL), tmp_path / "file")


def test_plot_pareto_each_method_has_a_color(tmp_path: Path) -> None:
    def num_orange(*groups: object) -> int:
        red, green, blue = pixels(plot_pareto, comparison(*groups), tmp_path).transpose(2, 0, 1)  # type: ignore[arg-type]
        return int(((red > 220) & (green > 90) & (green < 170) & (blue < 60)).sum())

    assert num_orange(NCL, SLOW) == 0
    assert num_orange(NCL, SLOW, DAS) > 100


def test_plot_loss_matrices_forgetting_is_red_on_one_color_scale(tmp_path: Path) -> None:
    def num_red(forgetting: float) -> int:
        groups = comparison(group("ncl", [(3.0, 0.9)]), group("das", [(3.0, forgetting)]))
        red, green, _ = pixels(plot_loss_matrices, groups, tmp_path).transpose(2, 0, 1)
        return int((red - green > 90).sum())

    assert num_red(0.9) > 1.5 * num_red(0.01)


def test_plot_overlap_equal_claims_are_dark(tmp_path: Path) -> None:
    def brightness(jaccard: float) -> float:
        das = group("das", [(3.0, 0.1)], importance=importance_summary(jaccard=jaccard))
        return float(pixels(plot_overlap, comparison(NCL, das), tmp_path).mean())

    assert brightness(0.0) - brightness(1.0) > 10


def test_plots_different_unit_groups_are_drawn(tmp_path: Path) -> None:
    full = importance_summary()
    only_head = full.model_copy(update={"groups": {"head": full.groups["head"]}})
    groups = comparison(DAS, group("das few", [(3.0, 0.1)], importance=only_head))
    for draw in (plot_overlap, plot_mask_saturation):
        assert min(pixels(draw, groups, tmp_path).shape[:2]) >= 300


def test_report_of_runs_with_unmeasured_losses(tmp_path: Path) -> None:
    """One of two seeds continues a run of which a model is gone: no mean is made of the rest."""
    first, second = NCL.runs
    matrix: list[list[float | None]] = [[6.0, None, 3.0], *first.loss_matrix[1:]]
    gone = first.model_copy(update={"loss_matrix": matrix})
    ended = second.model_copy(update={"loss_matrix": [*second.loss_matrix[:-1], [None, 3.2, 3.7]]})
    changed = comparison(NCL.model_copy(update={"runs": [gone, ended]}), DAS)
    write_comparison_report(Comparison.model_validate(changed.model_dump()), tmp_path)
    assert [gone.final_loss, ended.final_loss] == [first.final_loss, None]
    rows = {(row[0], row[1]): row[2:] for row in stage_rows(changed)}
    assert rows["before training", "ncl"] == ["6.0000", "-", "3.0000"]
    assert rows["after pubmed", "ncl"] == ["-", "3.1000", "3.8000"]
    assert rows["before training", "das"] == ["6.0000", "5.0000", "3.0000"]
