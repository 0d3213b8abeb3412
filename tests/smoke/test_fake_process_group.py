"""The product's engine as one rank of many: shards, bytes of every collective, memory; more in `tests/full`."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.fake_rank_checks import NO_REUSE, check_memory, check_rank, fake_run

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize(("rank", "world_size", "stage"), [(5, 64, 2), (511, 512, 3)])
def test_rank_of_many_exchanges_what_the_plan_says(rank: int, world_size: int, stage: int, tmp_path: Path) -> None:
    config = fake_run(tmp_path, world_size, stage, "method=ncl", *NO_REUSE)
    check_memory(config, check_rank(config, rank, world_size, stage), world_size)
