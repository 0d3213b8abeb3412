"""The report folder of a comparison: what it holds and says, and what its pictures show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from PIL import Image

from das_ds.errors import RunFolderError
from das_ds.reporting.comparison import Comparison
from das_ds.reporting.comparison_plots import loss_matrices_png, mask_saturation_png, overlap_png, pareto_png
from das_ds.reporting.comparison_report import report_text, write_comparison_report
from das_ds.run_dir import COMPARISON_FILE, REPORT_FILE
from helpers.comparisons import comparison, group, importance_numbers, pooled

NCL = group("ncl", [(3.0, 0.9), (3.2, 0.7)], train__learning_rate="1e-3")
SLOW = group("ncl slow", [(4.0, 0.5), (4.2, 0.3)], train__learning_rate="3e-4")
DAS = group("das", [(3.5, 0.6), (3.7, 0.3)], importance=importance_numbers(), train__learning_rate="1e-3")


def pixels(draw: Callable[[Comparison, Path], None], comparison: Comparison, folder: Path) -> numpy.ndarray:
    draw(comparison, folder / "picture.png")
    return numpy.asarray(Image.open(folder / "picture.png").convert("RGB")).astype(int)


def test_a_committed_file_gives_the_same_folder_again(tmp_path: Path) -> None:
    drawn = write_comparison_report(comparison(NCL, SLOW, DAS, pooled("pool", [2.5])), tmp_path / "new" / "first")
    assert sorted(drawn) == ["fullness", "loss_matrices", "overlap", "pareto"]
    write_comparison_report(Comparison.read(tmp_path / "new" / "first" / COMPARISON_FILE), tmp_path / "second")
    names = {path.name for path in drawn.values()} | {COMPARISON_FILE, REPORT_FILE}
    for folder in (tmp_path / "new" / "first", tmp_path / "second"):
        assert {path.name for path in folder.iterdir()} == names
    for name in names:
        assert (tmp_path / "new" / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_what_the_report_says() -> None:
    text = report_text(comparison(NCL, SLOW, DAS, notes=["x/y is not complete and is left out."]))
    assert "# Runs over acl -> pubmed" in text
    assert "With 2 seeds it is wide" in text
    assert "## Against ncl\n" in text and "## At equal learning\n" in text
    assert "Without importance files, and left out here: ncl, ncl slow." in text
    assert "## Notes\n\n- x/y is not complete and is left out.\n" in text
    assert "## End tasks" not in text
    assert all(f"({name}.png)" in text for name in ("pareto", "loss_matrices", "fullness", "overlap"))


def test_a_single_group_of_one_seed_is_not_made_more_of() -> None:
    text = report_text(comparison(group("ncl", [(3.0, 0.5)])))
    assert "One seed per group: no interval can be given" in text
    assert "## Against" not in text and "## At equal learning" not in text and "## Notes" not in text
    assert "Left out: no run has importance files." in text
    assert "fullness.png" not in text and "overlap.png" not in text


def test_six_seeds_need_no_warning() -> None:
    text = report_text(comparison(group("ncl", [(3.0 + 0.1 * seed, 0.5) for seed in range(6)])))
    assert "In brackets: 95 % t interval" in text and "it is wide" not in text


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=r"--output .*file: cannot be written \(File exists"):
        write_comparison_report(comparison(NCL), tmp_path / "file")


def test_methods_have_colours_of_their_own(tmp_path: Path) -> None:
    def num_orange(*groups: object) -> int:
        red, green, blue = pixels(pareto_png, comparison(*groups), tmp_path).transpose(2, 0, 1)  # type: ignore[arg-type]
        return int(((red > 220) & (green > 90) & (green < 170) & (blue < 60)).sum())

    assert num_orange(NCL, SLOW) == 0
    assert num_orange(NCL, SLOW, DAS) > 100


def test_forgetting_is_red_and_one_colour_range_serves_all_groups(tmp_path: Path) -> None:
    def num_red(forgetting: float) -> int:
        groups = comparison(group("ncl", [(3.0, 0.9)]), group("das", [(3.0, forgetting)]))
        red, green, _ = pixels(loss_matrices_png, groups, tmp_path).transpose(2, 0, 1)
        return int((red - green > 90).sum())

    assert num_red(0.9) > 1.5 * num_red(0.01)


def test_overlap_is_dark_where_claims_agree(tmp_path: Path) -> None:
    def brightness(jaccard: float) -> float:
        das = group("das", [(3.0, 0.1)], importance=importance_numbers(jaccard=jaccard))
        return float(pixels(overlap_png, comparison(NCL, das), tmp_path).mean())

    assert brightness(0.0) - brightness(1.0) > 10


def test_groups_with_different_unit_groups_stand_beside_each_other(tmp_path: Path) -> None:
    full = importance_numbers()
    only_head = full.model_copy(update={"groups": {"head": full.groups["head"]}})
    groups = comparison(DAS, group("das few", [(3.0, 0.1)], importance=only_head))
    for draw in (overlap_png, mask_saturation_png):
        assert min(pixels(draw, groups, tmp_path).shape[:2]) >= 300
