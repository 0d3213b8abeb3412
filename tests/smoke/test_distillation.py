"""Teachers and buffers on two ranks: exact, and the methods that use them equal plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.distillation_checks import check_teachers_are_exact_and_methods_equal_plain_torch
from helpers.parity import parity_configs, steps
from helpers.replay import DERPP
from helpers.run_ranks import run_ranks
from helpers.tiny_models import NO_DROPOUT
from helpers.training import train_all

pytestmark = pytest.mark.multirank


def test_kd_and_derpp_stage_3_equal_plain_torch(tmp_path: Path) -> None:
    check_teachers_are_exact_and_methods_equal_plain_torch(3, 2, tmp_path)


def test_derpp_repeated_step_replays_and_stores_the_same(tmp_path: Path) -> None:
    """In fp16, where the loss scale of the second run overflows all the time."""
    plain = parity_configs(tmp_path, 2, {"stage": 2}, [DERPP], precision="fp16")[0]
    scalers = ({"initial_scale_power": 8}, {"initial_scale_power": 24, "hysteresis": 1, "loss_scale_window": 1})
    runs = [
        plain.model_copy(update={"deepspeed": {"zero_optimization": {"stage": 2}, "fp16": fp16}}) for fp16 in scalers
    ]
    (_, calm), (_, restless) = run_ranks(train_all, 2, runs, steps(), NO_DROPOUT)[0]
    assert calm[-1]["skipped_steps"] == 0 and restless[-1]["skipped_steps"] > 8
    for name in ("loss/mlm", "loss/der", "loss/replay"):
        assert [line[name] for line in restless] == pytest.approx([line[name] for line in calm], rel=5e-3)
