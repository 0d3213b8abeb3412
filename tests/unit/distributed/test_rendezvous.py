"""Rendezvous of ranks: those present are reported while the others are awaited."""

from __future__ import annotations

import socket
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from das_ds.distributed import rendezvous
from das_ds.distributed.rendezvous import report_missing_ranks
from das_ds.errors import PreflightError
from helpers.waiting import until


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = int(probe.getsockname()[1])
    environment = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(number)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rendezvous, "REGISTER_AFTER_S", 0.0)
    return number


def test_rendezvous_rank_0_reports_missing_ranks_and_raises(
    port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendezvous, "REPORT_AFTER_S", 1.5)
    expected = r"do not find each other within 4 s \(runtime.hang_timeout\): .*; check that"
    # The inner one counts as a second rank, which is in another process otherwise.
    with (
        pytest.raises(PreflightError, match=expected),
        report_missing_ranks(None),
        report_missing_ranks(timedelta(seconds=4)),
    ):
        dist.TCPStore("127.0.0.1", port, 4, True, timedelta(seconds=4), multi_tenant=True)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("das_ds: ")]
    expected = f"das_ds: 2 of 4 ranks here, waiting at 127.0.0.1:{port} (WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT "
    assert len(lines) == 2 and all(line.startswith(expected) for line in lines)


def test_rendezvous_unanswered_rank_reports_itself(
    port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setattr(rendezvous, "REPORT_AFTER_S", 1.0)
    with pytest.raises(PreflightError), report_missing_ranks(timedelta(seconds=5)):
        dist.TCPStore("127.0.0.1", port, 4, False, timedelta(seconds=5))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("das_ds: ")]
    assert lines[0].startswith(f"das_ds: rank 2 of 4 is here, but gets no answer from 127.0.0.1:{port} ")
    assert lines[1].startswith("das_ds: the ranks do not find each other within 5 s ")


def test_rendezvous_port_in_use_is_named(port: int) -> None:
    message = rf"^MASTER_PORT: found {port}, which is in use on this machine, .*; expected a free port"
    with (
        socket.create_server(("", port)),
        pytest.raises(PreflightError, match=message),
        report_missing_ranks(timedelta(seconds=5)),
    ):
        dist.TCPStore("127.0.0.1", port, 4, True, timedelta(seconds=5))


def test_rendezvous_complete_prints_nothing(
    port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendezvous, "REPORT_AFTER_S", 0.3)
    threads = threading.active_count()
    with report_missing_ranks(None):
        pass
    until(lambda: threading.active_count() == threads)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with report_missing_ranks(None):
        assert threading.active_count() == threads
        time.sleep(0.4)
    assert "das_ds: " not in capfd.readouterr().err
