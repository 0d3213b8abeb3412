"""A rank that hangs ends all ranks in bounded time, and is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from das_ds.fault_tolerance.watchdog import EXIT_HANG
from helpers.watching import exit_codes

pytestmark = pytest.mark.multirank


def test_watchdog_hung_rank_ends_all_and_is_named(tmp_path: Path) -> None:
    assert exit_codes(tmp_path, "sleep", 1) == [EXIT_HANG, EXIT_HANG]
    for rank in range(2):
        text = (tmp_path / f"errors-{rank}").read_text()
        assert "rank 1 (pid " in text and "rank 0 (pid " not in text
