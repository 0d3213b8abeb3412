"""What masks leave of each input: against float64 on real ranks, and in runs that are stopped while they measure it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from das_ds.softmask.plasticity import DomainPlasticity
from helpers.plasticity import break_off_in
from helpers.plasticity_checks import check_plasticity
from helpers.resume import assert_same_run, resumable_run
from helpers.run_ranks import run_ranks
from helpers.runs import metrics_lines, run_all

pytestmark = pytest.mark.multirank

METHOD = {"name": "directions", "num_samples": 24, "min_passing": 0.9}


@pytest.mark.parametrize(("world_size", "stage"), [(3, 1), (2, 3)])
def test_plasticity_equals_float64(world_size: int, stage: int, tmp_path: Path) -> None:
    check_plasticity(tmp_path, world_size, stage)


def test_run_stopped_while_it_measures_and_within_the_domain_continues(tmp_path: Path) -> None:
    """On two ranks; the second domain is interrupted after three batches of its probe, and then after two steps."""

    def values(name: str) -> dict[str, Any]:
        return resumable_run(tmp_path, name, method=METHOD, asynchronous=False)

    run_ranks(run_all, 2, [values("complete")])
    places = run_ranks(break_off_in, 2, values("parts"), [("before", 3), ("train", 2)])[0]
    # The first save point of a phase is passed when it is entered.
    assert [place[:2] for place in places] == [("before", 1), ("train", 1)]
    run_ranks(run_all, 2, [values("parts")])
    assert_same_run(tmp_path / "parts", tmp_path / "complete")
    for name in ("complete", "parts"):
        # The end of the first domain, and the newest two: none of those within the probe of the second.
        assert len(list((tmp_path / name / "checkpoints").iterdir())) == 3
    for domain in ("00_food", "01_papers"):
        files = [tmp_path / name / "domains" / domain / "plasticity.json" for name in ("parts", "complete")]
        assert files[0].read_bytes() == files[1].read_bytes()
    first, second = (
        DomainPlasticity.read(tmp_path / "parts" / "domains" / domain / "plasticity.json")
        for domain in ("00_food", "01_papers")
    )
    assert first.before.plasticity == first.before.passing == 1.0
    assert first.after is not None and second.after is not None
    # The masks that the second domain finds are those that the first one left.
    assert second.before.plasticity == pytest.approx(first.after.plasticity, rel=1e-12)
    assert 0.0 < second.after.plasticity < second.before.plasticity < 1.0
    assert second.before.passing is not None and 0.0 < second.before.passing < 1.0
    for line in metrics_lines(tmp_path / "parts"):
        measured = first if line["domain"] == "food" else second
        assert line["plasticity"] == measured.before.plasticity
        assert line["passing_energy"] == measured.before.passing
    report = tmp_path / "parts" / "report"
    assert "## Plasticity" in (report / "report.md").read_text() and (report / "plasticity.png").exists()
