"""Masks of directions on every number of ranks up to 97 in one process, and on real ranks at every ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.direction_masks import CUTS, check_gradients
from helpers.masked_training_checks import check_masked_training
from helpers.parity import OFFLOAD


@pytest.mark.parametrize("cut", CUTS)
def test_apply_every_number_of_ranks_equals_complete_product(cut: str) -> None:
    for num_ranks in range(1, 98):
        check_gradients(cut, num_ranks)


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("stage", "offload"), [(0, False), *((stage, offload) for stage in (1, 2, 3) for offload in (False, True))]
)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_masked_training_equals_plain_torch(stage: int, world_size: int, offload: bool, tmp_path: Path) -> None:
    """The same weights on any number of ranks, at any stage."""
    zero = {"stage": stage, **(OFFLOAD if offload else {})}
    precisions = ("bf16",) if stage == 0 else ("bf16", "fp16")
    check_masked_training(tmp_path, world_size, zero, precisions)
