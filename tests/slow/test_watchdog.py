"""Ranks that die, freeze or hang: the others end in bounded time and name them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from das_ds.fault_tolerance.watchdog import EXIT_HANG
from helpers.watching import EXIT_LOST, exit_codes, suspended_exit_codes

pytestmark = pytest.mark.multirank

KILLED = -9
STANDING = "step 7 of food, forward and backward"
FROZEN_OR_KILLED = [("stop", 0, 2), ("stop", 1, 2), ("kill", 0, 2), ("kill", 1, 3)]
OTHERS = [("sleep", 1, 3), ("direct", 1, 2), ("lock", 1, 2), ("fail", 0, 2), ("patience", 0, 2)]
HEALTHY = [("silent", 0, 2), ("silent", 1, 2), ("broken", 0, 2), ("broken", 1, 2), ("blind", 1, 2)]
ALL = [*FROZEN_OR_KILLED, *OTHERS, *HEALTHY]
Case = tuple[str, int, int]
"""What a rank does, which one, of how many."""


class Cases:
    """All cases at once, for their ranks do nothing but wait for time-outs."""

    def __init__(self, folder: Path, pool: ThreadPoolExecutor) -> None:
        self._folders = {case: folder / "-".join(map(str, case)) for case in ALL}
        self._codes: dict[Case, Future[list[int | None]]] = {}
        for case, own in self._folders.items():
            own.mkdir()
            self._codes[case] = pool.submit(exit_codes, own, *case)
        self.suspended = pool.submit(suspended_exit_codes, folder)

    def result(self, what: str, bad_rank: int, world_size: int) -> tuple[list[int | None], Path]:
        """Exit codes of all ranks, and the folder of their messages."""
        case = what, bad_rank, world_size
        return self._codes[case].result(), self._folders[case]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cases]:
    with ThreadPoolExecutor(len(ALL) + 1) as pool:
        yield Cases(tmp_path_factory.mktemp("watchdog"), pool)


@pytest.mark.parametrize(("what", "bad_rank", "world_size"), FROZEN_OR_KILLED)
def test_watchdog_frozen_or_killed_rank_is_named(what: str, bad_rank: int, world_size: int, cases: Cases) -> None:
    codes, folder = cases.result(what, bad_rank, world_size)
    assert codes[bad_rank] == (KILLED if what == "kill" else None)
    sign = "is gone" if what == "kill" else "has not sent a heartbeat"
    others = set(range(world_size)) - {bad_rank}
    for rank in others:
        text = (folder / f"errors-{rank}").read_text()
        # A peer that dies makes a collective fail; whether the main thread or the watchdog knows first does not matter.
        assert codes[rank] in (EXIT_HANG, EXIT_LOST)
        assert f"rank {bad_rank} (pid " in text and sign in text and STANDING in text
        assert not any(f"rank {other} (pid " in text for other in others)


def test_watchdog_hung_rank_exits_with_all_others_and_reports_location(cases: Cases) -> None:
    codes, folder = cases.result("sleep", 1, 3)
    assert codes == [EXIT_HANG] * 3
    for rank in range(3):
        text, stacks = ((folder / name).read_text() for name in (f"errors-{rank}", f"hang-rank{rank}.txt"))
        for found in (text, stacks):
            assert "rank 1 (pid " in found and "has made no progress" in found and STANDING in found
            assert "sleep_for_ever" in found and "rank 0 (pid " not in found and "rank 2 (pid " not in found
        assert "watching.py" in stacks.split("\n", 1)[1]


def test_watchdog_rank_in_deepspeed_collective_is_not_named(cases: Cases) -> None:
    codes, folder = cases.result("direct", 1, 2)
    assert codes == [EXIT_HANG] * 2
    for rank in range(2):
        text = (folder / f"errors-{rank}").read_text()
        assert "rank 1 (pid " in text and "sleep_for_ever" in text and "rank 0 (pid " not in text


@pytest.mark.parametrize(("what", "bad_rank", "world_size"), HEALTHY)
def test_watchdog_own_failure_does_not_end_training(what: str, bad_rank: int, world_size: int, cases: Cases) -> None:
    codes, folder = cases.result(what, bad_rank, world_size)
    said = [(folder / f"errors-{rank}").read_text() for rank in range(world_size)]
    assert codes == [0] * world_size, said
    assert not list(folder.glob("hang*"))
    assert said[1 - bad_rank] == ""
    if what == "silent":
        assert said[bad_rank] == ""
    else:
        assert "training continues without" in said[bad_rank] and "has no attribute 'f_code'" in said[bad_rank]
        # Once for each thing that fails, however often it does.
        assert said[bad_rank].count("Traceback") == (2 if what == "broken" else 1)


def test_watchdog_rank_holding_the_gil_is_named(cases: Cases) -> None:
    codes, folder = cases.result("lock", 1, 2)
    assert codes == [EXIT_HANG, None]
    text = (folder / "errors-0").read_text()
    assert "rank 1 (pid " in text and "has not sent a heartbeat" in text


def test_watchdog_failed_rank_is_named_with_its_error(cases: Cases) -> None:
    codes, folder = cases.result("fail", 0, 2)
    assert codes == [1, EXIT_LOST]
    assert "rank 0 (pid " in (folder / "errors-1").read_text()
    assert "exited with ValueError: no such thing" in (folder / "errors-1").read_text()


def test_watchdog_suspended_timeout_is_not_a_hang(cases: Cases) -> None:
    codes, folder = cases.result("patience", 0, 2)
    assert codes == [0, 0]
    assert [(folder / f"errors-{rank}").read_text() for rank in range(2)] == ["", ""]
    assert not list(folder.glob("hang*"))


def test_watchdog_suspended_job_continues(cases: Cases) -> None:
    assert cases.suspended.result() == [0, 0]
