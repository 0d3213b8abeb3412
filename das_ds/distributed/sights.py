"""What one rank knows of all: ages of their rows by its own clock, and whether the run can go on."""

from __future__ import annotations

import threading

from das_ds.distributed.row_exchange import Table, store_is_on_rank_0
from das_ds.distributed.whereabouts import Row, Sight, culprits, loss_text, silence_text, stillness_text

SILENT_AFTER_ROUNDS = 5.0
"""When nothing moves, a rank whose row is this old is to blame."""
STORE_LOST_GRACE_S = 5.0
"""Seconds for the main thread to notice by itself that the process that holds the store has ended."""


class Sights:
    """Ages the rows of all ranks. Ages come from changes that this rank has seen, so no two clocks are compared.

    Args:
        rank: this rank.
        hang_timeout: seconds without progress or without a sign of life that are a fault.
        round_s: seconds in which a row that is renewed reaches this rank.
    """

    def __init__(self, rank: int, hang_timeout: float, round_s: float = 1.0) -> None:
        self._rank, self._hang_timeout = rank, hang_timeout
        self._silent_after = min(SILENT_AFTER_ROUNDS * round_s, hang_timeout / 2)
        self._lock = threading.Lock()
        self._table = Table((), "", 0, is_lost=False)
        self._changed: dict[int, tuple[int, float]] = {}
        self._left_since: dict[int, float] = {}
        self._lost_since: float | None = None
        self._now = self._answered = 0.0

    def update(self, table: Table, now: float) -> None:
        """Take in what the store answered last; `now` is on this rank's clock of seconds."""
        with self._lock:
            if table.num_answers != self._table.num_answers:
                self._answered = now
            if table.is_lost and self._lost_since is None:
                self._lost_since = now
            for row in table.rows:
                if self._changed.get(row.rank, (None, 0.0))[0] != row.beat:
                    self._changed[row.rank] = (row.beat, now)
                if row.left is not None:
                    self._left_since.setdefault(row.rank, now)
            self._table, self._now = table, now

    def fault(self, own: Row, left_grace_s: float) -> str | None:
        """Why this process has to end now; None: it need not."""
        with self._lock:
            if self._table.verdict:
                return self._table.verdict
            if self._lost_since is not None and self._now - self._lost_since > STORE_LOST_GRACE_S:
                return self._store_text(is_gone=True)
            if self._now - self._answered > self._hang_timeout:
                return self._store_text(is_gone=False)
            others = [sight for sight in self._sights() if sight.row.rank != self._rank]
            for sight in others:
                if sight.row.left is None and sight.age > self._hang_timeout:
                    return silence_text(sight)
                if sight.row.left is not None and self._now - self._left_since[sight.row.rank] > left_grace_s:
                    return loss_text(sight)
            is_stuck = own.idle > self._hang_timeout and not own.patient
            if is_stuck and not (own.waits and self._has_business(others)):
                return self._standstill_text(others, own)
            return None

    def lost(self, lost_after_s: float) -> str | None:
        """Which rank has ended, where a collective has failed; None: none that is known of."""
        with self._lock:
            if self._table.verdict:
                return self._table.verdict
            if self._table.is_lost:
                return self._store_text(is_gone=True)
            others = [sight for sight in self._sights() if sight.row.rank != self._rank]
            gone = [sight for sight in others if sight.row.left is not None or sight.age > lost_after_s]
            return "; ".join(loss_text(sight) for sight in gone) or None

    def _has_business(self, others: list[Sight]) -> bool:
        """Whether one of the others works, so that to wait for it is no fault."""
        return any(
            not sight.row.waits
            and sight.age <= self._silent_after
            and (sight.row.patient or sight.idle <= self._hang_timeout)
            for sight in others
        )

    def _standstill_text(self, others: list[Sight], own: Row) -> str:
        if self._now - self._answered > self._silent_after:
            return self._store_text(is_gone=False)
        found = culprits([*others, Sight(own, 0.0)], silent_after=self._silent_after, hang_timeout=self._hang_timeout)
        return "; ".join(
            silence_text(sight) if sight.age > self._silent_after else stillness_text(sight) for sight in found
        )

    def _store_text(self, *, is_gone: bool) -> str:
        """The process that holds the store has ended, or is frozen."""
        if not store_is_on_rank_0():
            state = "is gone" if is_gone else f"has not answered for {self._now - self._answered:.0f} s"
            return f"the launcher that holds the ranks' common store {state}"
        row = next(row for row in self._table.rows if row.rank == 0)
        sight = Sight(row, self._now - self._changed[0][1])
        return loss_text(sight) if is_gone else silence_text(sight)

    def _sights(self) -> list[Sight]:
        # While the store does not answer no row can be renewed, which is no rank's fault.
        return [Sight(row, self._answered - self._changed[row.rank][1]) for row in self._table.rows]
