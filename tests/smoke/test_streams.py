"""A run on streams that continues without its cache, at ZeRO 3 on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.resume import assert_same_run
from helpers.run_ranks import run_ranks
from helpers.stream_runs import check_windows_on_disk, complete_and_without_cache, streamed_runs

pytestmark = pytest.mark.multirank


def test_streamed_run_continued_without_its_cache_is_the_complete_run(tmp_path: Path) -> None:
    """In the middle of a mixture that has one stream, where another one is replayed."""
    complete, broken = streamed_runs(tmp_path, 3, ("complete", "broken"))
    run_ranks(complete_and_without_cache, 2, complete, broken, ("train", 1, 5))
    assert_same_run(tmp_path / "broken", tmp_path / "complete")
    for name in ("complete", "broken"):
        check_windows_on_disk(tmp_path / f"cache-{name}")
