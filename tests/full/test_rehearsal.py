"""The rehearsal that estimates a run's time, for methods that train in other ways than one domain after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.preflight import rehearsed
from helpers.run_ranks import run_ranks
from helpers.runs import small_run

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize(
    ("method", "stage", "num_stages"),
    [
        ({"name": "pool"}, 1, 1),
        ({"name": "one"}, 2, 2),
        ({"name": "ewc", "merge": {"weight": 0.5}}, 3, 2),
        ({"name": "regmean", "num_samples": 10}, 3, 2),
        ({"name": "das", "importance": {"num_samples": 10}, "view_dropout": 0.0}, 3, 2),
        ({"name": "ncl", "replay": {"fraction": 0.25, "loss": "kl"}}, 0, 2),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else str(value),
)
def test_rehearsal_of_method_times_its_stages(
    method: dict[str, Any], stage: int, num_stages: int, tmp_path: Path
) -> None:
    values = small_run(tmp_path, deepspeed={"zero_optimization": {"stage": stage}})
    values["method"] = method
    for result, measured in run_ranks(rehearsed, 2, values):
        assert result.status == "ok", result
        assert len(measured.steps) == num_stages and len(measured.evaluations) == num_stages + 1
    assert not list(tmp_path.glob(".*")) and not list((tmp_path / "run").iterdir())
