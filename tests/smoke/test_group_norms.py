"""Gradient norms by group, at the stage that shards most."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from helpers.group_norms import expected_group_norms, step_group_norms
from helpers.run_ranks import run_ranks
from helpers.training import random_batch, run_config

pytestmark = pytest.mark.multirank


def test_group_norms_at_zero3_on_two_ranks_are_those_of_plain_autograd(tmp_path: Path) -> None:
    config = run_config(
        tmp_path,
        train={"micro_batch_size": 2, "global_batch_size": 8},
        deepspeed={"zero_optimization": {"stage": 3}},
    )
    batch = random_batch(8, 0)
    expected = expected_group_norms(batch, num_parts=4)
    for measured, norm in run_ranks(step_group_norms, 2, config, batch):
        assert measured == pytest.approx(expected, rel=1e-5)
        assert math.hypot(*measured.values()) == pytest.approx(norm, rel=1e-6)
        assert set(measured) == {"attention", "mlp", "embeddings", "normalization", "other"}
