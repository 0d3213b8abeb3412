"""A run that continues an earlier one equals one run over all domains, also in a chain, and interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest

from das_ds.reporting.results import Results
from helpers.continued import (
    DECODER,
    METHODS,
    assert_continued,
    beginning,
    complete,
    continuing,
    long_run,
    run_parsed,
)
from helpers.resume import DROPOUT, assert_same_run, run_in_pieces
from helpers.run_ranks import run_ranks

pytestmark = pytest.mark.multirank


def test_chain_of_runs_over_a_decoder_equals_one_run(tmp_path: Path) -> None:
    general = {"train": [str(tmp_path / "general.txt")], "valid": [], "valid_fraction": 0.2}
    whole = long_run(
        tmp_path,
        "whole",
        model={"config": DECODER},
        general=general,
        method=METHODS["directions"],
        train={"reset_optimizer": False},
        deepspeed={"zero_optimization": {"stage": 3}},
    )
    second = continuing(whole, "second", "first", 1, 2)
    runs = [whole, beginning(whole, "first", 1), second, continuing(whole, "third", "second", 2, 3)]
    before = tmp_path / "first"
    run_ranks(run_parsed, 2, runs[:2])
    kept = _contents(before)
    run_ranks(run_parsed, 2, runs[2:])
    assert _contents(before) == kept
    assert_continued(tmp_path / "third", tmp_path / "whole", 2)
    # Its last domain is the second one of three: results over fewer domains, the same weights.
    assert len(Results.read(tmp_path / "second" / "results.json").loss_matrix) == 3


def test_continued_run_in_pieces_equals_one_run(tmp_path: Path) -> None:
    model = {"config": {**long_run(tmp_path, "unused")["model"]["config"], **DROPOUT}}
    changes = {"checkpoint": {"interval": 1, "async_save": False}, "evaluation": {"every_steps": 3}}
    whole = long_run(tmp_path, "whole", model=model, method=METHODS["das"], **changes)
    whole["evaluation"] = {**whole["evaluation"], "batch_size": 2}
    following = continuing(whole, "next", "first", 2, 3)
    run_ranks(run_parsed, 2, [whole, beginning(whole, "first", 2), following])
    assert_continued(tmp_path / "next", tmp_path / "whole", 2)
    pieces = complete({**following, "output_dir": tmp_path / "pieces"})
    _, breaks = run_ranks(run_in_pieces, 2, pieces, 3)[0]
    # Interrupted while models of the earlier run are evaluated, too.
    assert {("evaluate", number) for number in (0, 1, 2)} <= {(phase, number) for phase, number, _ in breaks}
    assert_same_run(tmp_path / "pieces", tmp_path / "next")


def _contents(folder: Path) -> dict[Path, tuple[int, int]]:
    """File -> size and time of its last change."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
