"""A run that continues an earlier one equals one run over all domains."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.continued import DECODER, METHODS, assert_continued, beginning, continuing, long_run, run_parsed
from helpers.run_ranks import run_ranks

pytestmark = pytest.mark.multirank


def test_continued_run_equals_one_run(tmp_path: Path) -> None:
    """A decoder that keeps its moments, with general text to protect."""
    whole = long_run(
        tmp_path,
        "whole",
        model={"config": DECODER},
        general={"train": [str(tmp_path / "general.txt")], "valid": [], "valid_fraction": 0.2},
        method=METHODS["directions"],
        train={"reset_optimizer": False},
        deepspeed={"zero_optimization": {"stage": 3}},
    )
    run_ranks(run_parsed, 2, [whole, beginning(whole, "first", 2), continuing(whole, "next", "first", 2, 3)])
    assert_continued(tmp_path / "next", tmp_path / "whole", 2)
