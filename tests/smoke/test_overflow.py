"""Steps whose gradient is not finite move nothing, are counted, and in fp16 are tried again at a lower loss scale."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from das_ds.config import RunConfig
from helpers.overflow import NUM_STEPS, collect_errors, infinite_importance, left_out, run_attempts
from helpers.parity import OFFLOAD, parity_configs, relative_difference, save_random_importance, steps
from helpers.run_ranks import run_ranks
from helpers.tiny_models import NO_DROPOUT
from helpers.training import random_batch, run_config, train_all

pytestmark = pytest.mark.multirank

HUGE = {"initial_scale_power": 24, "hysteresis": 1}


def fp16_run(folder: Path, zero: dict[str, Any], fp16: dict[str, Any]) -> RunConfig:
    train = {**run_config(folder).train.model_dump(), "precision": "fp16", "micro_batch_size": 2}
    return run_config(folder, train=train, deepspeed={"zero_optimization": zero, "fp16": fp16})


@pytest.mark.parametrize("zero", [{"stage": 1}, {"stage": 2, **OFFLOAD}, {"stage": 3}])
def test_step_overflow_moves_nothing(zero: dict[str, Any], tmp_path: Path) -> None:
    results = run_ranks(run_attempts, 2, [fp16_run(tmp_path, zero, HUGE)], random_batch(4, 0))
    assert results[0] == results[1]
    attempts = results[0][0]
    failed = [attempt for attempt in attempts if not attempt.moved]
    assert failed[0].scale == 2.0**24 and [a.step for a in failed] == [0] * len(failed)
    assert all(earlier.scale == 2 * later.scale for earlier, later in pairwise(failed))
    assert all(attempt.learning_rates[0] == attempt.learning_rates[1] for attempt in failed)
    applied = attempts[len(failed) :]
    assert [attempt.step for attempt in applied] == list(range(NUM_STEPS)) and all(a.moved for a in applied)
    assert applied[0].learning_rates[0] == failed[0].learning_rates[0]
    assert all(attempt.learning_rates[1] < attempt.learning_rates[0] for attempt in applied)
    assert {attempt.skipped for attempt in applied} == {len(failed)} and len(failed) > 3


@pytest.mark.parametrize("stage", [2, 3])
def test_run_with_overflow_equals_run_without(stage: int, tmp_path: Path) -> None:
    save_random_importance(tmp_path)
    initial = {"init_from": str(tmp_path / "importance.safetensors")}
    plain = parity_configs(tmp_path, 2, {"stage": stage}, [{"importance": initial}], precision="fp16")[0]
    zero = plain.deepspeed["zero_optimization"]  # type: ignore[index]
    # The second rises and overflows all the time: a step at which the scale rises must not divide by the new one.
    scalers = ({"initial_scale_power": 8}, {**HUGE, "loss_scale_window": 1})
    runs = [plain.model_copy(update={"deepspeed": {"zero_optimization": zero, "fp16": fp16}}) for fp16 in scalers]
    (calm, calm_lines), (restless, restless_lines) = run_ranks(train_all, 2, runs, steps(), NO_DROPOUT)[0]
    assert calm_lines[-1]["skipped_steps"] == 0 and restless_lines[-1]["skipped_steps"] > 8
    assert restless_lines[0]["skipped_steps"] > 3
    for name in ("loss", "lr", "grad_norm", "tokens_seen"):
        assert [line[name] for line in restless_lines] == pytest.approx([line[name] for line in calm_lines], rel=3e-3)
    difference = relative_difference(restless, calm)
    print(f"stage {stage}: {difference:.2e}, skipped {restless_lines[-1]['skipped_steps']}")
    assert difference < 3e-3


def test_retry_on_overflow_smallest_scale_raises(tmp_path: Path) -> None:
    scalers = ({"loss_scale": 2**24}, {**HUGE, "min_loss_scale": 2**22})
    runs = [fp16_run(tmp_path, {"stage": 2}, fp16) for fp16 in scalers]
    errors = run_ranks(collect_errors, 1, runs, random_batch(2, 0))[0]
    for error, scale in zip(errors, (2**24, 2**22), strict=True):
        assert f"the gradient is not finite at loss scale {scale:g}, which cannot fall further" in error


def runs_in(folder: Path, *precisions: str) -> list[RunConfig]:
    train = {**run_config(folder).train.model_dump(), "micro_batch_size": 2}
    zero2 = {"zero_optimization": {"stage": 2}}
    return [run_config(folder, train={**train, "precision": p}, deepspeed=zero2) for p in precisions]


def test_step_not_finite_without_scale_is_skipped(tmp_path: Path) -> None:
    for rank in run_ranks(left_out, 2, runs_in(tmp_path, "bf16", "fp32"), random_batch(4, 0)):
        for skipped, moved, error in rank:
            assert (skipped, moved) == (1, False)
            assert "the gradient is not finite at loss scale 1, which cannot fall further" in error


def test_importance_not_finite_raises_on_every_rank(tmp_path: Path) -> None:
    for rank in run_ranks(infinite_importance, 2, runs_in(tmp_path, "fp16", "fp32"), random_batch(4, 0)):
        for of_units, of_parameters in rank:
            assert of_units.startswith("importance: found a gradient of a gate that is not finite")
            assert of_parameters.startswith("the gradient is not finite at loss scale 1")
