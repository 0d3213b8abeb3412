"""Runs on streams, interrupted at every third boundary, and on other ranks, against the uninterrupted run."""

from __future__ import annotations

from pathlib import Path

import pytest

from das_ds.reporting.results import Results
from helpers.resume import assert_same_run, break_off_at, run_in_pieces
from helpers.run_ranks import run_ranks
from helpers.runs import metrics_lines, run_all
from helpers.stream_runs import streamed_runs

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize(("world_size", "stage"), [(2, 0), (2, 2), (1, 3)])
def test_streamed_run_in_pieces_equals_uninterrupted_run(world_size: int, stage: int, tmp_path: Path) -> None:
    complete, pieces = streamed_runs(tmp_path, stage, ("complete", "pieces"))
    run_ranks(run_all, world_size, [complete])
    _, breaks = run_ranks(run_in_pieces, world_size, pieces, 3)[0]
    assert {phase for phase, _, _ in breaks} >= {"train"} and len(breaks) > 5
    assert_same_run(tmp_path / "pieces", tmp_path / "complete")


def test_streamed_run_continued_on_other_ranks_agrees(tmp_path: Path) -> None:
    complete, broken = streamed_runs(tmp_path, 2, ("complete", "broken"))
    run_ranks(run_all, 2, [complete])
    assert run_ranks(break_off_at, 2, broken, ("train", 0, 3))[0]
    alone = {**broken, "train": {**broken["train"], "micro_batch_size": 4}}
    run_ranks(run_all, 1, [alone])
    mine, theirs = (Results.read(tmp_path / name / "results.json") for name in ("broken", "complete"))
    for row, expected in zip(mine.loss_matrix, theirs.loss_matrix, strict=True):
        assert row == pytest.approx(expected, abs=1e-4)
    for line, expected_line in zip(
        metrics_lines(tmp_path / "broken"), metrics_lines(tmp_path / "complete"), strict=True
    ):
        assert line["loss"] == pytest.approx(expected_line["loss"], abs=1e-4)
