"""The divergence from the base model on two ranks, at the stage that shards most."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.base_divergence import expected_divergences
from helpers.run_ranks import run_ranks
from helpers.runs import run_stopped_and_continued, small_run

pytestmark = pytest.mark.multirank


def test_divergence_of_a_run_that_was_stopped_is_that_of_complete_logits(tmp_path: Path) -> None:
    values = small_run(tmp_path, evaluation={"base_divergence": True}, deepspeed={"zero_optimization": {"stage": 3}})
    values["method"] = {"name": "ncl"}
    first, second = run_ranks(run_stopped_and_continued, 2, values)
    assert first.base_divergences == second.base_divergences
    assert first.base_divergences[0] < first.base_divergences[1]
    # Sums of float32 logits.
    assert first.base_divergences == pytest.approx(expected_divergences(values), rel=1e-4)
    assert first.summary["base_divergence/papers"] == first.base_divergences[1]
    report = (tmp_path / "run" / "report" / "report.md").read_text()
    assert f"| divergence from base on papers | {first.base_divergences[1]:.4f}" in " ".join(report.split())
