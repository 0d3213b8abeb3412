"""Masked matrices and their inputs on two ranks with everything sharded are those of one rank at stage 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from das_ds.config import RunConfig
from helpers.architectures import architecture_config
from helpers.linear_inputs import find_all
from helpers.run_ranks import run_ranks

pytestmark = pytest.mark.multirank

LORA: dict[str, Any] = {"lora": {"rank": 2, "alpha": 8.0, "target_modules": ["q_proj", "k_proj", "down_proj"]}}
MODEL_TYPES = ("deberta-v2", "gpt2", "mixtral")


def configs(folder: Path, world_size: int, stage: int) -> list[RunConfig]:
    return [
        *(architecture_config(folder, model_type, world_size, stage) for model_type in MODEL_TYPES),
        architecture_config(folder, "llama", world_size, stage, gradient_checkpointing=True),
        architecture_config(folder, "llama", world_size, stage, **LORA),
    ]


def test_inputs_on_two_ranks_at_stage_3_equal_one_rank_at_stage_0(tmp_path: Path) -> None:
    alone = run_ranks(find_all, 1, configs(tmp_path, 1, 0))[0]
    for ranks_own in run_ranks(find_all, 2, configs(tmp_path, 2, 3)):
        for found, expected in zip(ranks_own, alone, strict=True):
            assert not isinstance(found, str), found
            assert not isinstance(expected, str), expected
            assert found[0] == expected[0]
            for name, total in expected[1].items():
                assert torch.allclose(found[1][name], total, rtol=1e-4, atol=1e-4), name
