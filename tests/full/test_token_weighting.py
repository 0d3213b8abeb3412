"""Methods that weight or replace the losses of tokens, where the smoke test does not: stages, ranks, precisions."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.token_weighting_checks import check_16_bits_follow_plain_torch, check_token_weighting_equals_plain_torch

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize(("stage", "world_size"), [(0, 1), (0, 2), (1, 2), (2, 1), (2, 2), (3, 1)])
def test_eaft_and_replay_kl_equal_plain_torch(stage: int, world_size: int, tmp_path: Path) -> None:
    check_token_weighting_equals_plain_torch(stage, world_size, tmp_path)


@pytest.mark.parametrize(("precision", "stage"), [("bf16", 1), ("bf16", 3), ("fp16", 2), ("fp16", 3)])
def test_eaft_and_replay_kl_in_16_bits_follow_plain_torch(precision: str, stage: int, tmp_path: Path) -> None:
    check_16_bits_follow_plain_torch(precision, stage, 2, tmp_path)
