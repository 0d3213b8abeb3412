"""Flags of all ranks, read one boundary later."""

from __future__ import annotations

import pytest

from das_ds.distributed.flag_sync import Flags
from helpers.run_ranks import run_ranks
from helpers.watching import agreed_flags

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_flag_sync_exchange_returns_flags_of_previous_exchange(world_size: int) -> None:
    for found in run_ranks(agreed_flags, world_size):
        assert found["read"] == [Flags(), Flags(), Flags(save=True, writing=True), Flags(stop=True)]
        assert found["settled"] == [Flags(failed=True), Flags(), Flags()]


def test_flag_sync_stop_reasons_name_ranks() -> None:
    for found in run_ranks(agreed_flags, 2):
        assert found["reasons"] == ["SIGTERM (rank 0)", "the same (all ranks)", "own 0 (rank 0), own 1 (rank 1)"]
    assert run_ranks(agreed_flags, 3)[2]["reasons"][1] == "the same (all ranks)"
