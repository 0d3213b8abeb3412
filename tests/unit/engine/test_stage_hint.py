"""Where ZeRO shards nothing, stage 0 is named; where it would not do the same, it is not."""

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
    expected = f"ZeRO {zero['stage']} on one rank has nothing to shard; stage 0 (ds_configs/zero0.json) trains the same"
    assert hint == (f"{expected}, faster" if is_given else "")
