"""Stalled ranks, from heartbeats made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from das_ds.fault_tolerance.hang_detector import HangDetector
from das_ds.fault_tolerance.heartbeat import Heartbeat, PeerStatus, find_stalled_ranks
from das_ds.fault_tolerance.heartbeat_store import HeartbeatSnapshot

TIMEOUT = 20.0
GRACE = 10.0


def beat(rank: int, **changes: Any) -> Heartbeat:
    values: dict[str, Any] = {
        "rank": rank,
        "host": "node1",
        "pid": 100 + rank,
        "seq": 1,
        "phase": "food",
        "location": "forward and backward",
        "step": 7,
        "progress": (7, 2),
        "idle_s": TIMEOUT + 1,
        "timeout_suspended": False,
        "in_collective": True,
        "stack_location": "das_ds/training/domain_trainer.py:90 run",
    }
    return Heartbeat(**{**values, **changes})


def status(rank: int, age_s: float = 0.0, **changes: Any) -> PeerStatus:
    return PeerStatus(beat(rank, **changes), age_s)


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        # One that sends no heartbeats, whatever its last one says.
        ([status(0, progress=(1, 1), in_collective=False), status(1, 11.0)], [1]),
        # One that is late by what a busy machine costs is not silent.
        ([status(0, in_collective=False), status(1, 9.0)], [0]),
        # One that is idle outside a collective, though it is ahead.
        ([status(0, progress=(1, 1)), status(1, in_collective=False), status(2)], [1]),
        ([status(0, progress=(1, 1)), status(1, in_collective=None), status(2)], [1]),
        # Of several outside, those that are least far.
        ([status(0, in_collective=False), status(1, in_collective=False, progress=(7, 1))], [1]),
        ([status(rank, in_collective=False) for rank in range(2)], [0, 1]),
        # One that works outside does not stall the others.
        ([status(0, in_collective=False, idle_s=0.1), status(1, in_collective=False)], [1]),
        ([status(0, in_collective=False, timeout_suspended=True), status(1, in_collective=False)], [1]),
        # All inside one.
        ([status(0), status(1, progress=(6, 9))], [1]),
        # One that has left is reported otherwise.
        ([status(0), status(1, 99.0, exit_error="ValueError: x", progress=(1, 1))], [0]),
    ],
)
def test_find_stalled_ranks(statuses: list[PeerStatus], expected: list[int]) -> None:
    assert [found.heartbeat.rank for found in find_stalled_ranks(statuses, TIMEOUT)] == expected


def seen_by_rank_1(snapshot: HeartbeatSnapshot, seconds: float, *, answered: bool = True) -> HangDetector:
    """What rank 1 knows when it has had a snapshot for so long, of a store that answers without new heartbeats."""
    detector = HangDetector(1, TIMEOUT)
    detector.update(snapshot, 0.0)
    detector.update(replace(snapshot, num_answers=snapshot.num_answers + int(answered)), seconds)
    return detector


def known(*beats: Heartbeat, **changes: Any) -> HeartbeatSnapshot:
    return replace(HeartbeatSnapshot(beats, num_answers=1), **changes)


def test_diagnose_fresh_heartbeats_returns_none() -> None:
    detector = HangDetector(1, TIMEOUT)
    for seq in range(100):
        beats = (beat(0, seq=seq, idle_s=0.0), beat(1, seq=seq, idle_s=0.0))
        detector.update(HeartbeatSnapshot(beats, num_answers=seq), float(seq))
        assert detector.diagnose(beats[1], GRACE) is None and detector.find_lost_peers(3.0) is None


def test_diagnose_silent_rank_is_named_despite_suspended_timeout() -> None:
    snapshot = known(beat(0, idle_s=0.0, timeout_suspended=True, in_collective=None), beat(1))
    assert seen_by_rank_1(snapshot, TIMEOUT - 1).diagnose(beat(1), GRACE) is None
    for own in (beat(1), beat(1, in_collective=None), beat(1, timeout_suspended=True)):
        found = seen_by_rank_1(snapshot, TIMEOUT + 1).diagnose(own, GRACE)
        place = "step 7 of food, forward and backward"
        assert found == f"rank 0 (pid 100 on node1) has not sent a heartbeat for 21 s; last location: {place}"


@pytest.mark.parametrize(
    "own",
    [
        beat(1, idle_s=0.0, in_collective=None),
        # It waits, but not yet for the full timeout.
        beat(1, idle_s=TIMEOUT - 1),
        # It works, as on an export.
        beat(1, timeout_suspended=True, in_collective=None),
        beat(1, timeout_suspended=True, in_collective=False),
    ],
)
@pytest.mark.parametrize("silence", ["heartbeat", "store", "lost"])
def test_diagnose_own_progress_ignores_silent_peer(own: Heartbeat, silence: str) -> None:
    snapshot = known(beat(0, idle_s=0.0), beat(1), is_lost=silence == "lost")
    detector = seen_by_rank_1(snapshot, 100 * TIMEOUT, answered=silence == "heartbeat")
    assert detector.diagnose(own, GRACE) is None
    assert detector.diagnose(beat(1), GRACE) is not None


def test_diagnose_blind_rank_returns_none() -> None:
    for own in (beat(1), beat(1, in_collective=False), beat(1, in_collective=None)):
        snapshot = known(beat(0), beat(1), is_blind=True)
        assert seen_by_rank_1(snapshot, 100 * TIMEOUT, answered=False).diagnose(own, GRACE) is None
        snapshot = known(beat(0, exit_error="ValueError: x"), beat(1), is_blind=True)
        assert seen_by_rank_1(snapshot, 100 * TIMEOUT, answered=False).diagnose(own, GRACE) is None


def test_diagnose_stall_is_named_unless_timeout_suspended() -> None:
    snapshot = known(beat(0), beat(1))
    found = seen_by_rank_1(snapshot, 1.0).diagnose(beat(1, in_collective=False), GRACE)
    assert found == (
        "rank 1 (pid 101 on node1) has made no progress for 21 s; current location: step 7 of food, "
        "forward and backward; das_ds/training/domain_trainer.py:90 run"
    )
    assert seen_by_rank_1(snapshot, 1.0).diagnose(beat(1, in_collective=False, timeout_suspended=True), GRACE) is None
    assert seen_by_rank_1(snapshot, 1.0).diagnose(beat(1, in_collective=False, idle_s=TIMEOUT - 1), GRACE) is None


@pytest.mark.parametrize("in_collective", [False, None])
@pytest.mark.parametrize("busy", [{"idle_s": 0.1}, {"timeout_suspended": True}])
def test_diagnose_waiting_for_busy_peer_returns_none(busy: dict[str, Any], in_collective: bool | None) -> None:
    snapshot = known(beat(0, in_collective=in_collective, **busy), beat(1))
    # Its heartbeats may be late, as where a long call keeps Python's lock.
    for age in (1.0, TIMEOUT - 1):
        assert seen_by_rank_1(snapshot, age).diagnose(beat(1), GRACE) is None
    found = seen_by_rank_1(snapshot, TIMEOUT + 1).diagnose(beat(1), GRACE)
    assert found is not None and found.startswith("rank 0 ")


def test_diagnose_silent_store_names_its_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = known(beat(0, progress=(9, 9)), beat(1), beat(2))
    # Other heartbeats do not arrive either, which is not the fault of their ranks.
    found = seen_by_rank_1(snapshot, TIMEOUT + 1, answered=False).diagnose(beat(1), GRACE)
    assert found is not None and found.startswith("rank 0 (pid 100 on node1) has not sent a heartbeat for 21 s")
    assert "rank 2" not in found
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    found = seen_by_rank_1(snapshot, TIMEOUT + 1, answered=False).diagnose(beat(1), GRACE)
    assert found == "the launcher that hosts the ranks' common store has not answered for 21 s"


def test_find_lost_peers_lost_store_names_its_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = known(beat(0, idle_s=1.0), beat(1), is_lost=True)
    gone = "rank 0 (pid 100 on node1) is gone; last heartbeat: step 7 of food, forward and backward, {} s ago"
    assert seen_by_rank_1(snapshot, 2.0, answered=False).find_lost_peers(3.0) == gone.format(3)
    assert seen_by_rank_1(snapshot, 2.0, answered=False).diagnose(beat(1, idle_s=0.0), GRACE) is None
    late = seen_by_rank_1(snapshot, TIMEOUT + 1, answered=False)
    assert late.diagnose(beat(1), GRACE) == gone.format(22)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert late.find_lost_peers(3.0) == "the launcher that hosts the ranks' common store is gone"


def test_diagnose_exited_rank_is_named_with_its_error() -> None:
    snapshot = known(beat(0, exit_error="ValueError: x"), beat(1))
    text = "rank 0 (pid 100 on node1) exited with ValueError: x; last location: step 7 of food, forward and backward"
    assert seen_by_rank_1(snapshot, 0.0).find_lost_peers(3.0) == text
    assert seen_by_rank_1(snapshot, GRACE).diagnose(beat(1, idle_s=0.0), GRACE) is None
    assert seen_by_rank_1(snapshot, GRACE + 1).diagnose(beat(1, idle_s=0.0), GRACE) == text


def test_diagnose_reported_failure_is_returned() -> None:
    detector = seen_by_rank_1(known(beat(0), beat(1), failure_reason="rank 3 is to blame"), TIMEOUT + 1)
    assert detector.diagnose(beat(1), GRACE) == detector.find_lost_peers(3.0) == "rank 3 is to blame"
