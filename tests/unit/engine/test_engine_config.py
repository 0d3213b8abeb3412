"""Facts of DeepSpeed settings, and the hint that ZeRO shards nothing on one rank."""

from __future__ import annotations

from typing import Any

import pytest

from das_ds.config import TrainConfig
from das_ds.config.deepspeed import EngineConfig
from das_ds.engine.engine import stage_hint

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    "world_size, zero, train, is_given",
    [
        (1, {"stage": 1}, {"precision": "fp32"}, True),
        (1, {"stage": 3}, {"precision": "fp32"}, True),
        (1, {"stage": 2}, {"precision": "bf16", "global_batch_size": 8, "micro_batch_size": 8}, True),
        (1, {"stage": 1}, {"precision": "bf16", "global_batch_size": 8, "micro_batch_size": 4}, True),
        # Stage 2 sums micro-steps in fp32, stage 0 in bf16.
        (1, {"stage": 2}, {"precision": "bf16", "global_batch_size": 8, "micro_batch_size": 4}, False),
        (1, {"stage": 2}, {"precision": "fp16"}, False),
        (1, {"stage": 2, **OFFLOAD}, {"precision": "fp32"}, False),
        (1, {"stage": 0}, {"precision": "fp32"}, False),
        (2, {"stage": 2}, {"precision": "fp32"}, False),
    ],
)
def test_stage_hint_names_stage_0_where_one_rank_shards_nothing(
    world_size: int, zero: dict[str, Any], train: dict[str, Any], is_given: bool
) -> None:
    hint = stage_hint(EngineConfig.from_raw({"zero_optimization": zero}), TrainConfig(**train), world_size)
    expected = f"ZeRO {zero['stage']} on one rank has nothing to shard; stage 0 (deepspeed: zero0) trains the same"
    assert hint == (f"{expected}, faster" if is_given else "")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({}, (0, False, False)),
        ({"zero_optimization": "auto"}, (0, False, False)),
        ({"zero_optimization": {"stage": 2, **OFFLOAD}}, (2, True, False)),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": None}}, (3, False, False)),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1}}, (3, False, False)),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, (3, False, True)),
    ],
)
def test_engine_config_reads_facts_of_raw_settings(raw: dict[str, Any], expected: tuple[int, bool, bool]) -> None:
    config = EngineConfig.from_raw(raw)
    assert (config.zero_stage, config.is_offloaded, config.has_secondary_shards) == expected


def test_engine_config_without_leaf_modules_changes_nothing_else() -> None:
    config = EngineConfig.from_raw({"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0})
    changed = config.without_leaf_modules()
    assert changed.raw == {
        "zero_optimization": {"stage": 3, "leaf_module": {"classes": []}},
        "gradient_clipping": 1.0,
    }
    assert config.raw["zero_optimization"] == {"stage": 3} and changed.zero_stage == 3
