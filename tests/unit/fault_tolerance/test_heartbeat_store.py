"""The thread that exchanges heartbeats, over a store of this process that fails on demand."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from das_ds.fault_tolerance.heartbeat import Heartbeat
from das_ds.fault_tolerance.heartbeat_store import HeartbeatStore
from helpers.waiting import until


class FlakyStore:
    """A store whose calls fail as `failure` says."""

    def __init__(self) -> None:
        self._store = dist.HashStore()
        self.failure: Exception | None = None
        self.num_clones = 0
        self.can_connect = True

    def clone(self) -> FlakyStore:
        if not self.can_connect:
            raise dist.DistNetworkError("connection refused")
        self.num_clones += 1
        return self

    def set_timeout(self, timeout: timedelta) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if self.failure is not None:
            raise self.failure
        found: Callable[..., Any] = getattr(self._store, name)
        return found


class Rank:
    """A heartbeat of one rank."""

    def __init__(self) -> None:
        self.seq = 0
        self.failure: Exception | None = None

    def __call__(self) -> Heartbeat:
        if self.failure is not None:
            raise self.failure
        self.seq += 1
        return Heartbeat(
            rank=0,
            host="node1",
            pid=1,
            seq=self.seq,
            phase="",
            location="starting",
            step=0,
            progress=(0, 0),
            idle_s=0.0,
            timeout_suspended=False,
            in_collective=None,
        )


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> FlakyStore:
    """The process group's."""
    made = FlakyStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: made)
    return made


@contextmanager
def exchanging(rank: Rank) -> Iterator[HeartbeatStore]:
    """A heartbeat store of one rank, a hundred times a second."""
    ranks: Any = SimpleNamespace(info=SimpleNamespace(rank=0, world_size=1, is_main=True), barrier=lambda: None)
    exchange = HeartbeatStore(ranks, rank, 0.01)
    try:
        yield exchange
    finally:
        exchange.close(20.0)


def test_heartbeat_store_failing_heartbeat_still_reads(store: FlakyStore, caplog: pytest.LogCaptureFixture) -> None:
    rank = Rank()
    with caplog.at_level(logging.ERROR), exchanging(rank) as exchange:
        rank.failure = AttributeError("'tuple' object has no attribute 'f_code'")
        until(lambda: any("without a watchdog" in message for message in caplog.messages))
        answers = exchange.snapshot.num_answers
        # It reads all the same.
        until(lambda: exchange.snapshot.num_answers > answers + 5)
        assert not exchange.snapshot.is_blind and not exchange.snapshot.is_lost
        seq = exchange.snapshot.heartbeats[0].seq
        rank.failure = None
        until(lambda: exchange.snapshot.heartbeats[0].seq > seq)
    assert len(caplog.records) == 1 and "Traceback" in caplog.text and "f_code" in caplog.text


def test_heartbeat_store_failing_read_is_blind_until_it_succeeds(
    store: FlakyStore, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), exchanging(Rank()) as exchange:
        store.failure = ValueError("no such thing")
        until(lambda: exchange.snapshot.is_blind)
        store.failure = None
        until(lambda: not exchange.snapshot.is_blind)
    assert any("can end no run" in message for message in caplog.messages) and "no such thing" in caplog.text


def test_heartbeat_store_lost_connection_reconnects(store: FlakyStore, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), exchanging(Rank()) as exchange:
        store.failure = dist.DistNetworkError("Broken pipe")
        until(lambda: exchange.snapshot.is_lost and store.num_clones > 1)
        store.failure = None
        until(lambda: not exchange.snapshot.is_lost)
    assert "lost its connection to the ranks' common store (Broken pipe)" in caplog.text


def test_heartbeat_store_failed_reconnect_is_logged(store: FlakyStore, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), exchanging(Rank()) as exchange:
        store.can_connect = False
        store.failure = dist.DistNetworkError("Broken pipe")
        until(lambda: "cannot reach the ranks' common store: training continues without a watchdog" in caplog.text)
        assert exchange.snapshot.is_lost
