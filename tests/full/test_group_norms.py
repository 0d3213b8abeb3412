"""Gradient norms by group at every stage and precision, and in the lines of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from helpers.group_norms import expected_group_norms, step_group_norms
from helpers.parity import OFFLOAD
from helpers.run_ranks import run_ranks
from helpers.runs import metrics_lines, run_all, small_run
from helpers.training import random_batch, run_config

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize(
    ("stage", "extra", "precision", "tolerance"),
    [
        (0, {}, "fp32", 1e-5),
        (0, {}, "bf16", 0.05),
        (1, {}, "fp16", 0.02),
        (2, OFFLOAD, "fp32", 1e-5),
        (3, OFFLOAD, "bf16", 0.05),
    ],
)
def test_group_norms_are_those_of_plain_autograd(
    stage: int, extra: dict[str, Any], precision: str, tolerance: float, tmp_path: Path
) -> None:
    config = run_config(
        tmp_path,
        train={"micro_batch_size": 2, "global_batch_size": 8, "precision": precision},
        deepspeed={
            "zero_optimization": {"stage": stage, **extra},
            **({"fp16": {"initial_scale_power": 6}} if precision == "fp16" else {}),
        },
    )
    batch = random_batch(8, 0)
    expected = expected_group_norms(batch, num_parts=4)
    for measured, norm in run_ranks(step_group_norms, 2, config, batch):
        assert measured == pytest.approx(expected, rel=tolerance)
        assert math.hypot(*measured.values()) == pytest.approx(norm, rel=1e-5)


def test_lines_of_a_run_have_group_norms_that_make_up_the_norm(tmp_path: Path) -> None:
    values = small_run(tmp_path, train={"log_group_norms": True, "steps_per_domain": 4})
    values["method"] = {"name": "directions", "num_samples": 40}
    run_ranks(run_all, 2, [values])
    lines = metrics_lines(tmp_path / "run")
    for line in lines:
        norms = [value for name, value in line.items() if name.startswith("grad_norm/")]
        assert len(norms) == 5 and math.hypot(*norms) == pytest.approx(line["grad_norm"], rel=1e-5)
    # What the method freezes has no gradient.
    assert lines[-1]["grad_norm/normalization"] == 0.0 < lines[0]["grad_norm/normalization"]
