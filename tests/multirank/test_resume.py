"""A run that breaks off anywhere continues there, and ends as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.resume import assert_same_run, run_in_pieces
from helpers.run_ranks import run_ranks
from helpers.runs import run_all, small_run

pytestmark = pytest.mark.multirank

DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def run(
    folder: Path, name: str, *, stage: int = 2, method: dict[str, Any] | None = None, **train: Any
) -> dict[str, Any]:
    """A run with dropout that may be saved at every boundary; logging does not fall on every saved step."""
    base = small_run(folder)
    return {
        **base,
        "output_dir": folder / name,
        "model": {"config": {**base["model"]["config"], **DROPOUT}},
        "train": {**base["train"], "micro_batch_size": 2, "log_every": 3, **train},
        "method": {"name": "das", "importance": {"samples": 24}, **(method or {})},
        "evaluation": {"batch_size": 1, "max_sequences": 4},
        "deepspeed": {"zero_optimization": {"stage": stage}},
        "checkpoint": {"every_steps": 1},
    }


@pytest.mark.parametrize(
    ("stage", "granularity", "precision"),
    [(0, "unit", "fp32"), (2, "unit", "bf16"), (3, "parameter", "fp32"), (1, "parameter", "fp16")],
)
def test_a_run_in_pieces_is_the_whole_run(stage: int, granularity: str, precision: str, tmp_path: Path) -> None:
    method = {"importance": {"samples": 24, "granularity": granularity}}
    runs = [run(tmp_path, name, stage=stage, method=method, precision=precision) for name in ("whole", "parts")]
    run_ranks(run_all, 2, runs[:1])
    _, breaks = run_ranks(run_in_pieces, 2, runs[1], 5)[0]
    assert {phase for phase, _, _ in breaks} == {"evaluate", "before", "train", "after"}
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
