"""A run with sources, lengths, schedules and replay by domain, kept moments and evaluated corpora, stopped anywhere."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from das_ds.reporting.results import Results
from helpers.mixed_domains import mixed_run
from helpers.resume import DROPOUT, Place, assert_same_run, break_off_at, run_in_pieces
from helpers.run_ranks import run_ranks
from helpers.runs import metrics_lines, run_all, small_run

pytestmark = pytest.mark.multirank

CHANGES = {
    "checkpoint": {"interval": 1, "async_save": False},
    "evaluation": {"batch_size": 1, "max_sequences": 4},
    "method": {"importance": {"num_samples": 8}, "view_dropout": 0.0},
}


@pytest.mark.parametrize("stage", [0, 3])
def test_run_in_pieces_equals_uninterrupted_run(stage: int, tmp_path: Path) -> None:
    """With dropout, on two ranks, interrupted also between the domains, where moments are kept."""
    model = {"config": {**small_run(tmp_path)["model"]["config"], **DROPOUT}}
    zero = {"zero_optimization": {"stage": stage}}
    runs = [
        mixed_run(tmp_path, name, **CHANGES, model=model, deepspeed=zero, train={"log_interval": 1})
        for name in ("complete", "parts")
    ]
    run_ranks(run_all, 2, runs[:1])
    _, breaks = run_ranks(run_in_pieces, 2, runs[1], 7)[0]
    assert {(phase, done) for phase, done, _ in breaks} >= {("train", 0), ("train", 1)}, breaks
    assert any(done == 1 and phase != "train" for phase, done, _ in breaks), breaks
    assert_same_run(tmp_path / "parts", tmp_path / "complete")
    _check_lengths_and_rates(tmp_path / "complete")
    _check_columns(tmp_path / "complete")


def _check_lengths_and_rates(folder: Path) -> None:
    """Every domain has its own steps, peak, schedule and minimum."""
    lines = metrics_lines(folder)
    first = [line["lr"] for line in lines if line["domain"] == "food"]
    second = [line["lr"] for line in lines if line["domain"] == "papers"]
    assert len(first) == 9 and len(second) == 7
    # One step of warm-up, 6 % of nine; two of seven.
    assert first == pytest.approx([0.0, *(2e-3 * (0.1 + 0.9 * (9 - step) / 8) for step in range(1, 9))])
    cosine = [0.25 + 0.75 * (1 + math.cos(math.pi * step / 5)) / 2 for step in range(5)]
    assert second == pytest.approx([1e-3 * factor for factor in (0, 0.5, *cosine)])
    assert [line["tokens_seen"] for line in lines] == [128 * (step + 1) for step in range(len(lines))]


def _check_columns(folder: Path) -> None:
    results = Results.read(folder / "results.json")
    assert results.eval_domains == ["food", "papers", "general", "law", "code"]
    assert results.drift.keys() == {"law", "code"} and results.general_drift is not None
    matrix = results.loss_matrix
    assert results.drift["code"] == pytest.approx(matrix[-1][4] - matrix[0][4])
    report = (folder / "report" / "report.md").read_text()
    assert "| drift of law" in report and "general-domain drift" in report
    saved = json.loads((folder / "results.json").read_text())
    assert saved["drift"].keys() == {"law", "code"}


def test_run_moves_from_two_ranks_to_one(tmp_path: Path) -> None:
    """From between the domains, and from the middle of the second, to another stage; without dropout."""

    def values(name: str, stage: int, micro_batch_size: int) -> dict[str, Any]:
        train = {"log_interval": 1, "micro_batch_size": micro_batch_size}
        return mixed_run(tmp_path, name, **CHANGES, deepspeed={"zero_optimization": {"stage": stage}}, train=train)

    run_ranks(run_all, 2, [values("complete", 2, 2)])
    expected = metrics_lines(tmp_path / "complete")
    places: dict[str, Place] = {"between": ("evaluate", 1, 0), "within": ("train", 1, 4)}
    for name, place in places.items():
        assert all(run_ranks(break_off_at, 2, values(name, 2, 2), place))
    run_ranks(run_all, 1, [values(name, 3, 4) for name in places])
    for name in places:
        lines = metrics_lines(tmp_path / name)
        assert [line["global_step"] for line in lines] == [line["global_step"] for line in expected]
        for part in ("loss", "lr", "tokens_seen"):
            assert [line[part] for line in lines] == pytest.approx([line[part] for line in expected], rel=1e-3), name
        mine, theirs = (Results.read(tmp_path / run / "results.json") for run in (name, "complete"))
        for row, other in zip(mine.loss_matrix, theirs.loss_matrix, strict=True):
            assert row == pytest.approx(other, rel=1e-3)
