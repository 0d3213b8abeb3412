"""OSFT over two domains against plain torch in float64, at every ZeRO stage on every number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.osft_checks import check_osft
from helpers.parity import OFFLOAD


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("stage", "offload"), [(0, False), *((stage, offload) for stage in (1, 2, 3) for offload in (False, True))]
)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_osft_two_domains_equal_plain_torch(stage: int, world_size: int, offload: bool, tmp_path: Path) -> None:
    precisions = ("bf16",) if stage == 0 else ("bf16", "fp16")
    check_osft(tmp_path, world_size, {"stage": stage, **(OFFLOAD if offload else {})}, precisions)
