"""OSFT over two domains against plain torch in float64: both sides of every matrix, at every kind of sharding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.osft_checks import RATIOS, check_osft, expected
from helpers.parity import OFFLOAD, relative_difference

pytestmark = pytest.mark.multirank


def test_osft_changes_first_domain_already() -> None:
    for domain in (0, 1):
        without = expected(None).weights[domain]
        for ratio in RATIOS:
            assert relative_difference(expected(ratio).weights[domain], without) > 1e-2
        assert relative_difference(expected(RATIOS[0]).weights[domain], expected(RATIOS[1]).weights[domain]) > 1e-2


@pytest.mark.parametrize(
    ("zero", "world_size", "precisions"),
    [
        ({"stage": 0}, 2, ("bf16",)),
        ({"stage": 2, **OFFLOAD}, 2, ()),
        ({"stage": 3}, 3, ("bf16",)),
    ],
)
def test_osft_two_domains_equal_plain_torch(
    zero: dict[str, Any], world_size: int, precisions: tuple[str, ...], tmp_path: Path
) -> None:
    check_osft(tmp_path, world_size, zero, precisions)
