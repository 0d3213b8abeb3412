"""Runs that continue earlier ones, also in a chain, equal one run over all domains; the earlier ones are only read."""

from __future__ import annotations

from pathlib import Path

import pytest

from das_ds.reporting.results import Results
from helpers.continued import (
    DECODER,
    METHODS,
    assert_continued,
    beginning,
    continuing,
    long_run,
    run_parsed,
)
from helpers.resume import DROPOUT
from helpers.run_ranks import run_ranks

pytestmark = pytest.mark.multirank
SHARDED = {"zero_optimization": {"stage": 3}}


def test_continued_runs_equal_one_run(tmp_path: Path) -> None:
    """A chain of three runs over a decoder that keeps its moments, and an encoder with dropout, importance, replay."""
    general = {"train": [str(tmp_path / "general.txt")], "valid": [], "valid_fraction": 0.2}
    chain = long_run(
        tmp_path,
        "chain",
        model={"config": DECODER},
        general=general,
        method=METHODS["directions"],
        train={"reset_optimizer": False},
        deepspeed=SHARDED,
    )
    model = {"config": {**long_run(tmp_path, "unused")["model"]["config"], **DROPOUT}}
    whole = long_run(
        tmp_path, "whole", model=model, method=METHODS["das"], evaluation={"every_steps": 3}, deepspeed=SHARDED
    )
    runs = [
        chain,
        beginning(chain, "a", 1),
        continuing(chain, "ab", "a", 1, 2),
        continuing(chain, "abc", "ab", 2, 3),
        whole,
        beginning(whole, "first", 2),
        continuing(whole, "next", "first", 2, 3),
    ]
    run_ranks(run_parsed, 2, runs)
    assert_continued(tmp_path / "abc", tmp_path / "chain", 2)
    assert len(Results.read(tmp_path / "ab" / "results.json").loss_matrix) == 3
    assert_continued(tmp_path / "next", tmp_path / "whole", 2)
    for earlier, later in (("a", "ab"), ("ab", "abc"), ("first", "next")):
        started = (tmp_path / later / "config.yaml").stat().st_mtime_ns
        assert all(path.stat().st_mtime_ns < started for path in (tmp_path / earlier).rglob("*") if path.is_file())
