"""Hang detector: finds stalled and lost ranks from the ages of heartbeats, measured with the local clock."""

from __future__ import annotations

import threading

from das_ds.fault_tolerance.heartbeat import (
    Heartbeat,
    PeerStatus,
    describe_lost,
    describe_stalled,
    describe_unresponsive,
    find_stalled_ranks,
)
from das_ds.fault_tolerance.heartbeat_store import HeartbeatSnapshot, store_is_on_rank_0


class HangDetector:
    """Diagnoses hangs from the heartbeats of all ranks.

    The age of a heartbeat is the time since this rank saw it change, so clocks of two nodes are never compared. An old
    heartbeat alone proves nothing, as the thread that sends it may have failed or lack processor time: a rank that
    makes progress itself ends nothing because of a peer without heartbeats.

    Args:
        rank: this rank.
        hang_timeout: seconds without progress that count as a hang.
    """

    def __init__(self, rank: int, hang_timeout: float) -> None:
        self._rank = rank
        self._hang_timeout = hang_timeout
        self._lock = threading.Lock()
        self._snapshot = HeartbeatSnapshot()
        self._changed: dict[int, tuple[int, float]] = {}
        self._exited_since: dict[int, float] = {}
        self._now = 0.0
        self._answered_at = 0.0

    def update(self, snapshot: HeartbeatSnapshot, now: float) -> None:
        """Process the last answer of the store; `now` is in seconds on this rank's clock."""
        with self._lock:
            if snapshot.num_answers != self._snapshot.num_answers:
                self._answered_at = now
            for beat in snapshot.heartbeats:
                if self._changed.get(beat.rank, (None, 0.0))[0] != beat.seq:
                    self._changed[beat.rank] = (beat.seq, now)
                if beat.exit_error is not None:
                    self._exited_since.setdefault(beat.rank, now)
            self._snapshot = snapshot
            self._now = now

    def diagnose(self, own: Heartbeat, exit_grace_s: float) -> str | None:
        """Why this process has to exit now; None: it need not.

        Args:
            own: this rank's current heartbeat.
            exit_grace_s: seconds that a rank may continue after another exited with an error.
        """
        with self._lock:
            if self._snapshot.failure_reason:
                return self._snapshot.failure_reason
            if self._snapshot.is_blind:
                return None
            peers = self._peers()
            for peer in peers:
                rank = peer.heartbeat.rank
                if rank in self._exited_since and self._now - self._exited_since[rank] > exit_grace_s:
                    return describe_lost(peer)
            if own.idle_s <= self._hang_timeout or (own.timeout_suspended and not own.in_collective):
                return None
            return self._find_culprits(own, peers)

    def find_lost_peers(self, lost_after_s: float) -> str | None:
        """Which ranks have ended, to explain a failed collective; None: none as far as is known."""
        with self._lock:
            if self._snapshot.failure_reason:
                return self._snapshot.failure_reason
            if self._snapshot.is_lost:
                return self._describe_store_failure()
            lost = [
                peer for peer in self._peers() if peer.heartbeat.exit_error is not None or peer.age_s > lost_after_s
            ]
            return "; ".join(map(describe_lost, lost)) or None

    def _find_culprits(self, own: Heartbeat, peers: list[PeerStatus]) -> str | None:
        """Which ranks block this one, which made no progress for the full time-out; None: no rank is stuck."""
        if self._store_silence_s > self._hang_timeout:
            return self._describe_store_failure()
        silent = [peer for peer in peers if peer.heartbeat.exit_error is None and peer.age_s > self._hang_timeout]
        if silent:
            return "; ".join(map(describe_unresponsive, silent))
        if own.timeout_suspended:
            return None
        # This rank may be waiting for a peer that is working.
        if own.in_collective is not False and any(peer.may_be_busy(self._hang_timeout) for peer in peers):
            return None
        if self._store_silence_s > self._hang_timeout / 2:
            return self._describe_store_failure()
        stalled = find_stalled_ranks([*peers, PeerStatus(own, 0.0)], self._hang_timeout)
        return "; ".join(
            describe_unresponsive(status) if status.age_s > self._hang_timeout / 2 else describe_stalled(status)
            for status in stalled
        )

    @property
    def _store_silence_s(self) -> float:
        return self._now - self._answered_at

    def _describe_store_failure(self) -> str:
        """Message for a store whose process has ended or is frozen."""
        is_gone = self._snapshot.is_lost
        if not store_is_on_rank_0():
            state = "is gone" if is_gone else f"has not answered for {self._store_silence_s:.0f} s"
            return f"the launcher that hosts the ranks' common store {state}"
        beat = next(beat for beat in self._snapshot.heartbeats if beat.rank == 0)
        status = PeerStatus(beat, self._now - self._changed[0][1])
        return describe_lost(status) if is_gone else describe_unresponsive(status)

    def _peers(self) -> list[PeerStatus]:
        # Ages are measured up to the store's last answer: while it does not answer, no heartbeat can arrive.
        return [
            PeerStatus(beat, self._answered_at - self._changed[beat.rank][1])
            for beat in self._snapshot.heartbeats
            if beat.rank != self._rank
        ]
