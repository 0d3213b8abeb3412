"""Who is to blame, from rows made by hand."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from typing import Any

import pytest

from das_ds.distributed.row_exchange import Table
from das_ds.distributed.sights import SILENT_AFTER_ROUNDS, STORE_LOST_GRACE_S, Sights
from das_ds.distributed.whereabouts import Row, Sight, culprits, stack_position
from helpers.waiting import until

TIMEOUT = 20.0
GRACE = 10.0


def row(rank: int, **changes: Any) -> Row:
    values: dict[str, Any] = {
        "rank": rank,
        "host": "node1",
        "pid": 100 + rank,
        "beat": 1,
        "phase": "food",
        "place": "forward and backward",
        "step": 7,
        "progress": (7, 2),
        "idle": TIMEOUT + 1,
        "patient": False,
        "waits": True,
        "frame": "das_ds/training/domain.py:90 run",
    }
    return Row(**{**values, **changes})


@pytest.mark.parametrize(
    ("sights", "expected"),
    [
        # A row that is not renewed, whatever it says.
        ([Sight(row(0, progress=(1, 1), waits=False), 0.0), Sight(row(1), 9.0)], [1]),
        # One that stands still outside a collective, though it is ahead.
        ([Sight(row(0, progress=(1, 1)), 0.0), Sight(row(1, waits=False), 0.0), Sight(row(2), 0.0)], [1]),
        # Of several outside, those that are least far.
        ([Sight(row(0, waits=False), 0.0), Sight(row(1, waits=False, progress=(7, 1)), 0.0)], [1]),
        ([Sight(row(rank, waits=False), 0.0) for rank in range(2)], [0, 1]),
        # One that works outside holds nobody up.
        ([Sight(row(0, waits=False, idle=0.1), 0.0), Sight(row(1, waits=False), 0.0)], [1]),
        ([Sight(row(0, waits=False, patient=True), 0.0), Sight(row(1, waits=False), 0.0)], [1]),
        # All inside one.
        ([Sight(row(0), 0.0), Sight(row(1, progress=(6, 9)), 0.0)], [1]),
        # One that has left is reported otherwise.
        ([Sight(row(0), 0.0), Sight(row(1, left="ValueError: x", progress=(1, 1)), 99.0)], [0]),
    ],
)
def test_culprits(sights: list[Sight], expected: list[int]) -> None:
    found = culprits(sights, silent_after=SILENT_AFTER_ROUNDS, hang_timeout=TIMEOUT)
    assert [sight.row.rank for sight in found] == expected


def seen_by_rank_1(table: Table, seconds: float, *, answered: bool = True) -> Sights:
    """What rank 1 knows when it has had `table` for so long, of a store that answers without rows being renewed."""
    sights = Sights(1, TIMEOUT)
    sights.update(table, 0.0)
    sights.update(replace(table, num_answers=table.num_answers + int(answered)), seconds)
    return sights


def table(*rows: Row, verdict: str = "", is_lost: bool = False) -> Table:
    return Table(rows, verdict, 1, is_lost)


def test_nothing_is_wrong_while_rows_are_renewed() -> None:
    sights = Sights(1, TIMEOUT)
    for beat in range(100):
        rows = (row(0, beat=beat, idle=0.0), row(1, beat=beat, idle=0.0))
        sights.update(Table(rows, "", beat, is_lost=False), float(beat))
        assert sights.fault(rows[1], GRACE) is None and sights.lost(3.0) is None


def test_a_rank_without_a_sign_of_life_ends_the_run_even_where_patience_is_due() -> None:
    rows = table(row(0, idle=0.0, patient=True), row(1))
    assert seen_by_rank_1(rows, TIMEOUT - 1).fault(row(1, idle=0.0), GRACE) is None
    found = seen_by_rank_1(rows, TIMEOUT + 1).fault(row(1, idle=0.0), GRACE)
    place = "step 7 of food, forward and backward"
    assert found == f"rank 0 (pid 100 on node1) has given no sign of life for 21 s; it stood at: {place}"


def test_standing_still_is_a_fault_unless_patience_is_due() -> None:
    rows = table(row(0), row(1))
    found = seen_by_rank_1(rows, 1.0).fault(row(1, waits=False), GRACE)
    assert found == (
        "rank 1 (pid 101 on node1) has made no progress for 21 s; it stands at: step 7 of food, forward and backward; "
        "das_ds/training/domain.py:90 run"
    )
    assert seen_by_rank_1(rows, 1.0).fault(row(1, waits=False, patient=True), GRACE) is None
    assert seen_by_rank_1(rows, 1.0).fault(row(1, waits=False, idle=TIMEOUT - 1), GRACE) is None


@pytest.mark.parametrize("busy", [{"idle": 0.1}, {"patient": True}])
def test_to_wait_for_a_rank_that_works_is_no_fault(busy: dict[str, Any]) -> None:
    assert seen_by_rank_1(table(row(0, waits=False, **busy), row(1)), 1.0).fault(row(1), GRACE) is None
    # It is frozen.
    found = seen_by_rank_1(table(row(0, waits=False, **busy), row(1)), SILENT_AFTER_ROUNDS + 1).fault(row(1), GRACE)
    assert found is not None and found.startswith("rank 0 ")


def test_a_store_that_does_not_answer_is_rank_0s(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(row(0, progress=(9, 9)), row(1), row(2))
    # Other rows are not renewed either, which is not the fault of their ranks.
    for own in (row(1), row(1, idle=0.0)):
        found = seen_by_rank_1(rows, TIMEOUT + 1, answered=False).fault(own, GRACE)
        assert found is not None and found.startswith("rank 0 (pid 100 on node1) has given no sign of life for 21 s")
        assert "rank 2" not in found
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    found = seen_by_rank_1(rows, TIMEOUT + 1, answered=False).fault(row(1), GRACE)
    assert found == "the launcher that holds the ranks' common store has not answered for 21 s"


def test_a_store_that_is_gone_is_rank_0s(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(row(0, idle=1.0), row(1), is_lost=True)
    gone = "rank 0 (pid 100 on node1) is gone; its last sign of life: step 7 of food, forward and backward, 3 s ago"
    assert seen_by_rank_1(rows, 2.0, answered=False).lost(3.0) == gone
    sights = Sights(1, TIMEOUT)
    sights.update(rows, 1.0)
    sights.update(rows, 1.0 + STORE_LOST_GRACE_S)
    assert sights.fault(row(1, idle=0.0), GRACE) is None
    sights.update(rows, 1.5 + STORE_LOST_GRACE_S)
    assert "rank 0 (pid 100 on node1) is gone" in str(sights.fault(row(1, idle=0.0), GRACE))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert sights.lost(3.0) == "the launcher that holds the ranks' common store is gone"


def test_a_rank_that_has_left_with_an_error_is_named_with_it() -> None:
    rows = table(row(0, left="ValueError: x"), row(1))
    text = "rank 0 (pid 100 on node1) has left with ValueError: x; it stood at: step 7 of food, forward and backward"
    assert seen_by_rank_1(rows, 0.0).lost(3.0) == text
    assert seen_by_rank_1(rows, GRACE).fault(row(1, idle=0.0), GRACE) is None
    assert seen_by_rank_1(rows, GRACE + 1).fault(row(1, idle=0.0), GRACE) == text


def test_what_another_rank_has_found_stands() -> None:
    sights = seen_by_rank_1(table(row(0), row(1), verdict="rank 3 is to blame"), TIMEOUT + 1)
    assert sights.fault(row(1), GRACE) == sights.lost(3.0) == "rank 3 is to blame"


def test_the_position_of_a_thread_that_waits_for_other_ranks() -> None:
    waits, line = stack_position(threading.get_ident())
    assert not waits and line.startswith("das_ds/distributed/whereabouts.py:") and line.endswith(" stack_position")
    for file, is_collective in (("/x/torch/distributed/distributed_c10d.py", True), ("/x/torch/functional.py", False)):
        code: dict[str, Any] = {}
        exec(compile("def hold(lock):\n    lock.acquire()", file, "exec"), code)
        lock = threading.Lock()
        lock.acquire()
        thread = threading.Thread(target=code["hold"], args=(lock,), daemon=True)
        thread.start()
        assert thread.ident is not None
        until(lambda thread=thread: sys._current_frames()[thread.ident].f_code.co_name == "hold")
        assert stack_position(thread.ident) == (is_collective, f"{file}:2 hold")
        lock.release()
        thread.join()
    assert stack_position(thread.ident) == (False, "ended")
