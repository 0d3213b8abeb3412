"""The product's engine as one rank of many, on one core: shards, bytes of every collective of a step, and memory.

Collectives are those of the trainer's whole step. A method whose exchanges are missing from its `step_use` fails here.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.fake_rank_checks import NO_REUSE, busiest_rank, check_memory, check_rank, fake_run

pytestmark = pytest.mark.multirank

RANKS = (8, 24, 64, 96, 512)
METHODS = (
    "method=das",
    "method={name: das, importance: {granularity: parameter}, contrastive: {weight: 0.0}}",
)
"""Methods with exchanges of their own, and with none; naive training is in every other test."""


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", RANKS)
def test_step_of_any_rank(world_size: int, stage: int, tmp_path: Path) -> None:
    rank = {1: 0, 2: world_size // 2 + 1, 3: world_size - 1}[stage]
    config = fake_run(tmp_path, world_size, stage, "method=ncl", *NO_REUSE)
    check_memory(config, check_rank(config, rank, world_size, stage), world_size)


def test_step_at_stage_0_reduces_gradients_only(tmp_path: Path) -> None:
    config = fake_run(tmp_path, 8, 0, "method=ncl", micro_steps=2)
    check_memory(config, check_rank(config, 3, 8, 0), 8)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_step_of_two_micro_steps_with_fp32_reduction(stage: int, tmp_path: Path) -> None:
    overrides = ("method=ncl", "deepspeed.communication_data_type=fp32", *NO_REUSE)
    check_rank(fake_run(tmp_path, 64, stage, *overrides, micro_steps=2), 63, 64, stage)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_method_exchanges_what_it_says(method: str, stage: int, tmp_path: Path) -> None:
    check_rank(fake_run(tmp_path, 24, stage, method, *NO_REUSE, micro_steps=2), 7, 24, stage)


@pytest.mark.parametrize("is_recomputed", ["false", "true"])
@pytest.mark.parametrize("reuse", [0, 40_000, 100_000, 1_000_000])
def test_stage_3_gathers_less_what_it_reuses(reuse: int, is_recomputed: str, tmp_path: Path) -> None:
    overrides = (*NO_REUSE, f"deepspeed.zero_optimization.stage3_max_reuse_distance={reuse}")
    config = fake_run(tmp_path, 8, 3, "method=ncl", f"model.gradient_checkpointing={is_recomputed}", *overrides)
    check_rank(config, 3, 8, 3, gathers_rel=0.15)


def test_stage_3_gathers_small_parameters_once(tmp_path: Path) -> None:
    overrides = (*NO_REUSE, "deepspeed.zero_optimization.stage3_param_persistence_threshold=500")
    check_rank(fake_run(tmp_path, 8, 3, "method=ncl", *overrides, micro_steps=2), 0, 8, 3)


@pytest.mark.parametrize("form", ["{apply_to: both}", "{apply_to: gradient, rank: 12}", "{apply_to: update, rank: 12}"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", [8, 64, 512])
def test_directions_exchange_cut_vectors_only(world_size: int, stage: int, form: str, tmp_path: Path) -> None:
    """Bytes of the rank that sends most, no collective of another kind, and held memory."""
    method = f"method={{name: directions, {form[1:]}"
    config = fake_run(tmp_path, world_size, stage, method, *NO_REUSE)
    rank = busiest_rank(config, world_size)
    check_memory(config, check_rank(config, rank, world_size, stage), world_size, rank)


def test_directions_at_stage_0_exchange_nothing(tmp_path: Path) -> None:
    config = fake_run(tmp_path, 8, 0, "method=directions")
    check_memory(config, check_rank(config, 3, 8, 0), 8, 3)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("world_size", [8, 64])
def test_osft_exchanges_cut_matrices_only(world_size: int, stage: int, tmp_path: Path) -> None:
    """Bytes of the rank that sends most, and no collective of another kind."""
    config = fake_run(tmp_path, world_size, stage, "method=osft", *NO_REUSE)
    check_rank(config, busiest_rank(config, world_size), world_size, stage)


def test_osft_at_stage_0_exchanges_nothing_and_holds_all_subspaces(tmp_path: Path) -> None:
    config = fake_run(tmp_path, 8, 0, "method=osft")
    check_memory(config, check_rank(config, 3, 8, 0), 8, 3)
