"""The model of comparison.json: round trip, derived losses, and rejection of inconsistent files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from das_ds.errors import RunFolderError
from das_ds.reporting.comparison import Comparison
from das_ds.run_dir import COMPARISON_FILE
from das_ds.storage import write_json_with_checksum
from helpers.comparisons import comparison, group, importance_summary, pooled, run_summary


def test_comparison_round_trip_is_equal(tmp_path: Path) -> None:
    path = tmp_path / COMPARISON_FILE
    written = comparison(
        group("ncl", [(3.0, 0.9), (3.2, 0.7)]),
        group("das lr=1e-3", [(3.1, 0.4)], importance=importance_summary(), train__learning_rate="1e-3"),
        pooled("pool", [2.5]),
        notes=["something was left out."],
    )
    written.write(path)
    assert Comparison.read(path) == written
    assert list(tmp_path.iterdir()) == [path]
    content = json.loads(path.read_text())
    assert content["format_version"] == 1
    assert content["groups"][0]["runs"][1]["seed"] == 1
    assert content["groups"][0]["runs"][1]["loss_matrix"][2] == pytest.approx([3.9, 3.2, 3.7])


def test_run_summary_losses_worked_example() -> None:
    run = run_summary(0, 3.0, 0.5)
    assert (run.loss_after_learning, run.final_loss) == (3.0, 3.25)
    (at_once,) = pooled("pool", [2.5]).runs
    assert (at_once.loss_after_learning, at_once.final_loss) == (2.5, 2.5)
    assert run.cost.rank_hours == 2.0


def test_comparison_inconsistent_runs_are_rejected() -> None:
    with pytest.raises(ValidationError, match=r"each seed once, found seeds \[0, 0\]"):
        group("ncl", [(1.0, 0.0)]).model_validate(
            {**group("ncl", [(1.0, 0.0)]).model_dump(), "runs": [run_summary(0, 1.0, 0.0).model_dump()] * 2}
        )
    with pytest.raises(ValidationError, match="loss matrices of 2 rows, one per stage"):
        group("ncl", [(1.0, 0.0)]).model_validate(
            {**group("ncl", [(1.0, 0.0)]).model_dump(), "stages": ["before training", "after pool"]}
        )
    unit = importance_summary()
    runs = [
        run_summary(0, 1.0, 0.0, importance=unit),
        run_summary(1, 1.0, 0.0, importance=unit.model_copy(update={"sources": ["acl", "phone"]})),
    ]
    with pytest.raises(ValidationError, match="importance of the same sources, groups and layers in all runs"):
        group("das", [(1.0, 0.0)]).model_validate({**group("das", [(1.0, 0.0)]).model_dump(), "runs": runs})
    with pytest.raises(ValidationError, match="labels that differ, the reference das among them"):
        comparison(group("ncl", [(1.0, 0.0)]), reference="das")
    with pytest.raises(ValidationError, match="matrices of 2 columns"):
        values = comparison(group("ncl", [(1.0, 0.0)])).model_dump()
        comparison(group("ncl", [(1.0, 0.0)])).model_validate({**values, "eval_domains": ["acl", "pubmed"]})


def test_read_unusable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / COMPARISON_FILE
    with pytest.raises(RunFolderError, match=r"comparison\.json: cannot be read \(No such file"):
        Comparison.read(path)
    write_json_with_checksum(
        path, {**comparison(group("ncl", [(1.0, 0.0)])).model_dump(mode="json"), "format_version": 9}
    )
    with pytest.raises(RunFolderError, match=r"found format_version .*, expected a comparison of runs, 1"):
        Comparison.read(path)
    comparison(group("ncl", [(1.0, 0.0)])).write(path)
    path.write_text(path.read_text().replace("1800.0", "900.0"))
    with pytest.raises(RunFolderError, match="was altered"):
        Comparison.read(path)
    with pytest.raises(RunFolderError, match=r"missing/comparison\.json: cannot be written \(No such file"):
        comparison(group("ncl", [(1.0, 0.0)])).write(tmp_path / "missing" / COMPARISON_FILE)
