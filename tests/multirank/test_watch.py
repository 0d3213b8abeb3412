"""Ranks that die, freeze or hang: the others end in bounded time and name them."""

from __future__ import annotations

from pathlib import Path

import pytest

from das_ds.distributed.watch import EXIT_HANG
from helpers.watching import EXIT_LOST, exit_codes, suspended_exit_codes

pytestmark = pytest.mark.multirank

KILLED = -9
STANDING = "step 7 of food, forward and backward"


@pytest.mark.parametrize(
    ("what", "bad_rank", "world_size"), [("stop", 0, 2), ("stop", 1, 2), ("kill", 0, 2), ("kill", 1, 3)]
)
def test_a_rank_that_is_frozen_or_killed_is_named(what: str, bad_rank: int, world_size: int, tmp_path: Path) -> None:
    codes = exit_codes(tmp_path, what, bad_rank, world_size)
    assert codes[bad_rank] == (KILLED if what == "kill" else None)
    sign = "is gone" if what == "kill" else "has given no sign of life"
    others = set(range(world_size)) - {bad_rank}
    for rank in others:
        text = (tmp_path / f"errors-{rank}").read_text()
        # A peer that dies makes a collective fail; whether the main thread or the watch knows first does not matter.
        assert codes[rank] in (EXIT_HANG, EXIT_LOST)
        assert f"rank {bad_rank} (pid " in text and sign in text and STANDING in text
        assert not any(f"rank {other} (pid " in text for other in others)


def test_a_rank_that_hangs_ends_with_all_others_and_says_where(tmp_path: Path) -> None:
    assert exit_codes(tmp_path, "sleep", 1, world_size=3) == [EXIT_HANG] * 3
    for rank in range(3):
        text, stacks = ((tmp_path / name).read_text() for name in (f"errors-{rank}", f"hang-rank{rank}.txt"))
        for found in (text, stacks):
            assert "rank 1 (pid " in found and "has made no progress" in found and STANDING in found
            assert "sleep_for_ever" in found and "rank 0 (pid " not in found and "rank 2 (pid " not in found
        assert "watching.py" in stacks.split("\n", 1)[1]


def test_a_rank_that_keeps_the_lock_of_python_is_named(tmp_path: Path) -> None:
    assert exit_codes(tmp_path, "lock", 1) == [EXIT_HANG, None]
    text = (tmp_path / "errors-0").read_text()
    assert "rank 1 (pid " in text and "has given no sign of life" in text


def test_a_rank_that_fails_is_named_with_its_error(tmp_path: Path) -> None:
    codes = exit_codes(tmp_path, "fail", 0)
    assert codes == [1, EXIT_LOST]
    assert "rank 0 (pid " in (tmp_path / "errors-1").read_text()
    assert "has left with ValueError: no such thing" in (tmp_path / "errors-1").read_text()


def test_patience_is_no_fault_and_a_watch_ends_without_a_word(tmp_path: Path) -> None:
    assert exit_codes(tmp_path, "patience", 0) == [0, 0]
    assert [(tmp_path / f"errors-{rank}").read_text() for rank in range(2)] == ["", ""]
    assert not list(tmp_path.glob("hang*"))


def test_a_job_that_is_suspended_as_a_whole_goes_on(tmp_path: Path) -> None:
    assert suspended_exit_codes(tmp_path) == [0, 0]
