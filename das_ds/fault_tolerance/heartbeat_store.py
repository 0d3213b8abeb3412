"""The ranks' heartbeats in the store that made the process group; a thread, as the store may answer late or never."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from das_ds.distributed.process_group import LONG_TIMEOUT, ProcessGroup
from das_ds.fault_tolerance.heartbeat import Heartbeat
from das_ds.thread_guard import ThreadGuard

logger = logging.getLogger(__name__)

READERS_PER_S = 64
"""With more ranks than this each reads less often, so that the store has time for training's needs."""
_num_stores = 0


@dataclass(frozen=True)
class HeartbeatSnapshot:
    """What the store answered last."""

    heartbeats: tuple[Heartbeat, ...] = ()
    failure_reason: str = ""
    """What ended the run, in the words of the rank that found it first; empty: nothing."""
    num_answers: int = 0
    """Counts the store's answers."""
    is_lost: bool = False
    """The connection to the store is broken: the process that holds it has ended."""
    is_blind: bool = False
    """The last attempt to read failed on this rank, so that what is known here is old."""


class HeartbeatStore:
    """Publishes this rank's heartbeat and reads those of all ranks, once a period.

    Built by all ranks together. Uses a connection of its own: calls over one connection wait for each other.

    Args:
        ranks: the process group.
        own_heartbeat: this rank's heartbeat as it is now.
        period_s: seconds between two heartbeats.
    """

    def __init__(self, ranks: ProcessGroup, own_heartbeat: Callable[[], Heartbeat], period_s: float) -> None:
        global _num_stores
        _num_stores += 1
        self._own_heartbeat, self._period_s = own_heartbeat, period_s
        self._store = _connect()
        prefix = f"das_ds/watchdog/{_num_stores}"
        self._keys = [f"{prefix}/{rank}" for rank in range(ranks.info.world_size)]
        self._key, self._failure_key = self._keys[ranks.info.rank], f"{prefix}/failure"
        self.read_every_s = period_s * max(1.0, ranks.info.world_size / READERS_PER_S)
        self._next_read = 0.0
        self._reported_failure: str | None = None
        self._wake, self._is_closed = threading.Event(), False
        self._name = f"rank {ranks.info.rank}"
        self._publishing = ThreadGuard(f"{self._name} could not send its heartbeat: training goes on, unwatched")
        self._reading = ThreadGuard(
            f"{self._name} could not read the heartbeats of all ranks: training goes on, and its watchdog, which sees "
            "nothing, ends no run"
        )
        self._publish()
        if ranks.info.is_main:
            self._store.set(self._failure_key, "")
        ranks.barrier()
        self.snapshot = HeartbeatSnapshot()
        self._read()
        self._thread = threading.Thread(target=self._run, name="das-ds-heartbeat", daemon=True)
        self._thread.start()

    def report_failure(self, reason: str) -> None:
        """Tell all ranks what ended the run; the first report stands, and is soon read from the snapshot."""
        self._reported_failure = reason
        self._wake.set()

    def close(self, wait_s: float) -> None:
        """Publish this rank's heartbeat a last time and end; a store that does not answer is left alone after that.

        Args:
            wait_s: longest time to wait.
        """
        self._is_closed = True
        self._wake.set()
        self._thread.join(wait_s)

    def _run(self) -> None:
        while not self._is_closed:
            self._wake.wait(self._period_s)
            self._wake.clear()
            try:
                self._exchange()
            except dist.DistError as error:
                self.snapshot = replace(self.snapshot, is_lost=True)
                if self._is_closed or not self._reconnect(error):
                    return

    def _exchange(self) -> None:
        """Publish and read; each goes on where the other fails.

        Raises:
            DistError: the connection is broken.
        """
        connection_error: dist.DistError | None = None
        for guard, task in ((self._publishing, self._publish), (self._reading, self._read)):
            with guard:
                try:
                    task()
                except dist.DistError as error:
                    connection_error = error
        if connection_error is not None:
            raise connection_error
        if self._reading.has_failed:
            self.snapshot = replace(self.snapshot, is_blind=True)

    def _reconnect(self, error: dist.DistError) -> bool:
        """Connect anew: a network may break a connection between two processes that both go on."""
        reason = str(error).splitlines()[0]
        logger.warning("%s lost its connection to the ranks' common store (%s); connecting anew", self._name, reason)
        try:
            self._store, self._next_read = _connect(), 0.0
        except RuntimeError:
            logger.warning("%s cannot reach the ranks' common store: training goes on, unwatched", self._name)
            return False
        return True

    def _publish(self) -> None:
        self._store.set(self._key, self._own_heartbeat().model_dump_json())
        if self._reported_failure is not None:
            self._store.compare_set(self._failure_key, "", self._reported_failure)

    def _read(self) -> None:
        now = time.monotonic()
        if now < self._next_read and self._reported_failure is None:
            return
        *beats, failure = self._store.multi_get([*self._keys, self._failure_key])
        heartbeats = tuple(Heartbeat.model_validate_json(beat) for beat in beats)
        self.snapshot = HeartbeatSnapshot(heartbeats, failure.decode(), self.snapshot.num_answers + 1)
        self._next_read = now + self.read_every_s


def _connect() -> Any:
    # Typed as a store of any kind, which need not have all that the one behind the process group has.
    default: Any = dist.distributed_c10d._get_default_store()
    store = default.clone()
    # An answer that comes after its time would be taken for that to the next question; and where the process that holds
    # the store is suspended together with this one, it comes late.
    store.set_timeout(LONG_TIMEOUT)
    return store


def store_is_on_rank_0() -> bool:
    """Whether the store lives in rank 0's process; under torchrun it lives in the launcher's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
