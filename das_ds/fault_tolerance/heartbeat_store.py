"""Heartbeat store: exchanges heartbeats through the process group's store, on a thread because the store may block."""

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
from das_ds.distributed.torch_internals import default_store
from das_ds.fault_tolerance.heartbeat import Heartbeat
from das_ds.thread_guard import ThreadGuard

logger = logging.getLogger(__name__)

READERS_PER_S = 64
"""With more ranks than this each rank reads less often, so that the store can still serve training."""
_num_stores = 0


@dataclass(frozen=True)
class HeartbeatSnapshot:
    """The store's last answer."""

    heartbeats: tuple[Heartbeat, ...] = ()
    failure_reason: str = ""
    """Why the run ends, as reported by the first rank that found out; empty: it does not."""
    num_answers: int = 0
    """Counts the store's answers."""
    is_lost: bool = False
    """Whether the connection to the store is broken: the process that hosts it has ended."""
    is_blind: bool = False
    """Whether the last read failed on this rank, so that the heartbeats are outdated."""


class HeartbeatStore:
    """Publishes this rank's heartbeat and reads those of all ranks, once a period.

    Built by all ranks together. Uses a separate connection, because calls over one connection wait for each other.

    Args:
        ranks: the process group.
        own_heartbeat: returns this rank's current heartbeat.
        period_s: seconds between two heartbeats.
    """

    def __init__(self, ranks: ProcessGroup, own_heartbeat: Callable[[], Heartbeat], period_s: float) -> None:
        global _num_stores
        _num_stores += 1
        self._own_heartbeat = own_heartbeat
        self._period_s = period_s
        self._store = _connect()
        prefix = f"das_ds/watchdog/{_num_stores}"
        self._keys = [f"{prefix}/{rank}" for rank in range(ranks.info.world_size)]
        self._key = self._keys[ranks.info.rank]
        self._failure_key = f"{prefix}/failure"
        self.read_every_s = period_s * max(1.0, ranks.info.world_size / READERS_PER_S)
        self._next_read = 0.0
        self._reported_failure: str | None = None
        self._wake = threading.Event()
        self._is_closed = False
        self._name = f"rank {ranks.info.rank}"
        self._publishing = ThreadGuard(
            f"{self._name} could not send its heartbeat: training continues without a watchdog"
        )
        self._reading = ThreadGuard(
            f"{self._name} could not read the heartbeats of all ranks: training continues, and this rank's watchdog "
            "can end no run"
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
        """Report to all ranks why the run ends; the first report wins and appears in the snapshot."""
        self._reported_failure = reason
        self._wake.set()

    def close(self, wait_s: float) -> None:
        """Publish this rank's heartbeat a last time and end the thread.

        Args:
            wait_s: longest time to wait for a store that does not answer.
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
        """Publish and read; an error in one does not prevent the other.

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
        """Reconnect: a network may break the connection although both processes run."""
        reason = str(error).splitlines()[0]
        logger.warning("%s lost its connection to the ranks' common store (%s); reconnecting", self._name, reason)
        try:
            self._store = _connect()
            self._next_read = 0.0
        except RuntimeError:
            logger.warning("%s cannot reach the ranks' common store: training continues without a watchdog", self._name)
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
    store = default_store().clone()
    # A long time-out: a late answer would be read as that to the next call, and answers are late whenever the process
    # that hosts the store is suspended together with this one.
    store.set_timeout(LONG_TIMEOUT)
    return store


def store_is_on_rank_0() -> bool:
    """Whether the store lives in rank 0's process; under torchrun it lives in the launcher's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
