"""One norm per optimizer step: the host waits for it once, and it is that of all gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from das_ds.config import RunConfig
from helpers.parity import OFFLOAD
from helpers.run_ranks import run_ranks
from helpers.step_costs import measure_costs, measure_norms, shares_beyond_bf16
from helpers.training import random_batch, run_config

pytestmark = pytest.mark.multirank

MODES: tuple[tuple[int, dict[str, Any], tuple[str, ...]], ...] = (
    (0, {}, ("fp32", "bf16")),
    (1, {}, ("fp32", "bf16", "fp16")),
    (2, {}, ("fp32", "bf16", "fp16")),
    (2, OFFLOAD, ("fp32", "bf16", "fp16")),
    (3, {}, ("fp32", "bf16", "fp16")),
    (3, OFFLOAD, ("fp32", "bf16", "fp16")),
)
EACH_MODE = pytest.mark.parametrize("stage, extra, precisions", MODES)


def runs(folder: Path, stage: int, extra: dict[str, Any], precisions: tuple[str, ...]) -> list[RunConfig]:
    zero = {"stage": stage, **extra}
    train = {"micro_batch_size": 2, "global_batch_size": 4, "learning_rate": 1e-4}
    fp16 = {"fp16": {"initial_scale_power": 6}}
    return [
        run_config(
            folder,
            train={**train, "precision": precision},
            deepspeed={"zero_optimization": zero, **(fp16 if precision == "fp16" else {})},
        )
        for precision in precisions
    ]


@EACH_MODE
def test_a_step_waits_for_the_device_once(
    stage: int, extra: dict[str, Any], precisions: tuple[str, ...], tmp_path: Path
) -> None:
    for costs in run_ranks(measure_costs, 2, runs(tmp_path, stage, extra, precisions), random_batch(4, 0))[0]:
        print(stage, extra, costs)
        assert (costs.reads_in_backward, costs.reads_in_step) == (0, 1)


@EACH_MODE
def test_the_norm_is_that_of_all_gradients(
    stage: int, extra: dict[str, Any], precisions: tuple[str, ...], tmp_path: Path
) -> None:
    results = run_ranks(measure_norms, 2, runs(tmp_path, stage, extra, precisions), random_batch(4, 0))
    for (norm, square), (other_norm, other_square) in zip(*results, strict=True):
        assert norm == other_norm
        expected = math.sqrt(square + other_square if stage > 0 else square)
        assert norm == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_are_reduced_in_the_type_that_the_deepspeed_file_names(stage: int, tmp_path: Path) -> None:
    plain = runs(tmp_path, stage, {}, ("bf16",))[0]
    in_fp32 = plain.model_copy(update={"deepspeed": {**plain.deepspeed, "communication_data_type": "fp32"}})  # type: ignore[dict-item]
    for rounded, kept in run_ranks(shares_beyond_bf16, 2, [plain, in_fp32], random_batch(4, 0)):
        assert rounded == 0.0 and kept > 0.1
