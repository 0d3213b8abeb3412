"""Formulas of a step's traffic, by hand; `test_fake_process_group.py` compares them with DeepSpeed."""

from __future__ import annotations

from typing import Any

import pytest

from das_ds.config.deepspeed import EngineConfig
from das_ds.models.size import Collective, Sharding, StepUse
from das_ds.preflight.traffic import WeightSizes, bytes_sent, step_collectives
from helpers.zero_layout import owned

# Matrices of 100 and 57 elements, a vector of 10; two layers.
WEIGHTS = WeightSizes((100, 57), (10,), (), (80, 77))


def traffic(
    stage: int, num_ranks: int, micro_steps: int = 1, method: StepUse | None = None, **zero: Any
) -> dict[tuple[str, str], int]:
    engine = EngineConfig.from_raw(
        {"gradient_accumulation_steps": micro_steps, "zero_optimization": {"stage": stage, **zero}}
    )
    sharding = Sharding(stage=stage, num_ranks=num_ranks, weight_bytes=2, gradient_bytes=4, num_moments=2)
    found = step_collectives(WEIGHTS, sharding, engine, method or StepUse(), is_recomputed=False)
    return {(collective.kind, collective.content): collective.num_bytes for collective in found}


LOSSES = {("all_reduce", "losses and number of tokens"): 8}
NORM = {("all_reduce", "gradient norm"): 8}


def test_one_rank_exchanges_nothing() -> None:
    assert traffic(3, 1) == {}


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, {("all_reduce", "gradients"): 2 * 167, **LOSSES}),
        # 157 and 10 elements, in multiples of 8.
        (1, {("all_reduce", "gradients"): 2 * 167, ("all_gather", "weights"): 2 * (160 + 16), **NORM, **LOSSES}),
        (2, {("all_reduce", "gradients"): 3 * 2 * 167, ("all_gather", "weights"): 2 * (160 + 16), **NORM, **LOSSES}),
    ],
)
def test_traffic_of_three_micro_steps(stage: int, expected: dict[tuple[str, str], int]) -> None:
    assert traffic(stage, 4, 3) == expected


@pytest.mark.parametrize(
    ("threshold", "reuse", "elements"),
    [
        # Elements in multiples of 4: 100, 60 and 12. Two gathers of each in each of three micro-steps.
        (0, 0, 3 * 2 * 172),
        # The vector once.
        (10, 0, 12 + 3 * 2 * 160),
        # The last 50 elements of the forward pass stay.
        (0, 100, 3 * (2 * 172 - 50)),
        (0, 10**9, 3 * 172),
        (10**5, 0, 172),
    ],
)
def test_stage_3_gathers(threshold: int, reuse: int, elements: int) -> None:
    found = traffic(3, 4, 3, stage3_param_persistence_threshold=threshold, stage3_max_reuse_distance=reuse)
    assert found == {
        ("reduce_scatter", "gradients"): 3 * 2 * 172,
        ("all_gather", "weights"): 2 * elements,
        **NORM,
        **LOSSES,
    }


def test_method_adds_losses_exchanges_and_passes() -> None:
    method = StepUse(forward_passes=1, num_losses=2, collectives=(Collective("all_to_all", "codes", 7),))
    zero = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    found = traffic(3, 4, 1, method, **zero)
    assert found["all_to_all", "codes"] == 7
    assert found["all_reduce", "losses and number of tokens"] == 16
    assert found["all_gather", "weights"] == 2 * 3 * 172


def test_bytes_sent_in_a_ring() -> None:
    assert bytes_sent(Collective("all_reduce", "", 800), 8) == 1400
    assert bytes_sent(Collective("all_gather", "", 800), 8) == 700
    assert bytes_sent(Collective("reduce_scatter", "", 800), 8) == 700
    assert bytes_sent(Collective("all_to_all", "", 800), 8) == 800


@pytest.mark.parametrize("world_size", [2, 8, 24, 64, 96, 512])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shards_of_all_ranks_cover_every_weight_once(stage: int, world_size: int) -> None:
    """The arithmetic that the engine's shards are compared with."""
    sizes = {"a": (1007, True), "b": (3, False), "c": (640, True), "d": (64, False), "e": (1, True)}
    found = {name: [0] * numel for name, (numel, _) in sizes.items()}
    for rank in range(world_size):
        for name, first, numel in owned(sizes, stage, rank, world_size):
            for element in range(first, first + numel):
                found[name][element] += 1
    assert all(count == 1 for counts in found.values() for count in counts)
