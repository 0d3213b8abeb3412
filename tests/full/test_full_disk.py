"""A disk that is full where rank 0 alone writes: every rank ends with the same error, and none blames another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.command_runs import (
    exit_codes,
    fill_disk_of_exports,
    fill_disk_of_importance,
    fill_disk_of_metrics,
    fill_disk_of_tokenizers,
    start_training,
)
from helpers.runs import small_run

pytestmark = pytest.mark.multirank

UNIT, PARAMETER = (
    {
        "name": "das",
        "importance": {"granularity": granularity, "num_samples": 4},
        "contrastive": {"weight": 0.0},
    }
    for granularity in ("unit", "parameter")
)
DIRECTIONS = {"name": "directions", "num_samples": 4}


@pytest.mark.parametrize(
    ("disturb", "method", "said"),
    [
        (fill_disk_of_importance, UNIT, "importance_general.safetensors: cannot be written"),
        (fill_disk_of_importance, PARAMETER, "importance_general.safetensors: cannot be written"),
        (fill_disk_of_importance, DIRECTIONS, "domains/00_food/directions.safetensors: cannot be written"),
        (fill_disk_of_exports, DIRECTIONS, "cannot write the model to"),
        (fill_disk_of_tokenizers, DIRECTIONS, "cannot write the model to"),
        (fill_disk_of_metrics, DIRECTIONS, "metrics.jsonl: cannot be written (File too large)"),
    ],
)
def test_a_full_disk_of_rank_0_is_one_error_on_all_ranks(
    disturb: Callable[[], None], method: dict[str, Any], said: str, tmp_path: Path
) -> None:
    values = small_run(tmp_path, method=method, general=None)
    values["train"] = {**values["train"], "steps_per_domain": 4, "log_interval": 1}
    assert exit_codes(start_training(values, tmp_path, 2, disturb)) == [2, 2]
    errors, others = ((tmp_path / f"stderr_{rank}").read_text() for rank in (0, 1))
    (line,) = [line for line in errors.splitlines() if line.startswith("das_ds: ")]
    assert said in line
    assert "Traceback" not in errors + others and "das_ds: " not in others
