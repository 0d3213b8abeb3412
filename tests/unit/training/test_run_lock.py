"""The lock of a run folder: one start at a time, and a killed one leaves no lock."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from das_ds.errors import RunFolderError
from das_ds.run_dir import LOCK_FILE
from das_ds.training.run_lock import RECORD_BYTES, Holder, RunLock, current_holder
from helpers.locking import holding_process
from helpers.waiting import until

BEAT_S = 0.05
STALE_S = 0.6


@contextmanager
def lock(folder: Path, on_loss: Callable[[str], None] = pytest.fail) -> Iterator[RunLock]:
    with RunLock(folder, on_loss, beat_s=BEAT_S, stale_s=STALE_S) as one:
        yield one


def write_holder(folder: Path, **changes: Any) -> Holder:
    """A lock file as a process on another node leaves it."""
    holder = replace(Holder.own(), **{"kernel": "another", "host": "node7", "pid": 4711, "locked": True, **changes})
    with open(folder / LOCK_FILE, "r+" if (folder / LOCK_FILE).exists() else "w") as file:
        file.write(json.dumps(asdict(holder)).ljust(RECORD_BYTES))
    return holder


def holder_in(folder: Path) -> Holder:
    return Holder(**json.loads((folder / LOCK_FILE).read_text()))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def without_file_system_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refused)
    monkeypatch.setattr("das_ds.training.run_lock.SETTLE_S", 0.0)


def test_run_lock_second_start_raises_and_names_holder(tmp_path: Path) -> None:
    with holding_process(tmp_path / "run") as pid, lock(tmp_path / "run") as second:
        since = holder_in(tmp_path / "run").since
        expected = (
            f"run is held by another start, pid {pid} on {socket.gethostname()} since {since}; wait until it ends"
        )
        with pytest.raises(RunFolderError, match="output_dir: ") as error:
            second.acquire()
        assert str(error.value).endswith(expected)
        # The holder lost nothing by it.
        with pytest.raises(RunFolderError):
            second.acquire()


def test_run_lock_of_killed_process_is_free(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with holding_process(tmp_path):
        pass
    assert (tmp_path / LOCK_FILE).exists()
    with RunLock(tmp_path, pytest.fail, stale_s=1e9) as second:
        second.acquire()
        assert holder_in(tmp_path).pid == os.getpid()
    assert capsys.readouterr().err == ""


def test_run_lock_of_frozen_process_is_held(tmp_path: Path) -> None:
    with holding_process(tmp_path) as pid, lock(tmp_path) as second:
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(RunFolderError, match=f"pid {pid}"):
            second.acquire()


def test_run_lock_release_removes_lock_file(tmp_path: Path) -> None:
    for _ in range(2):
        with lock(tmp_path) as one:
            one.acquire()
        assert not list(tmp_path.iterdir())


def test_run_lock_remote_holder_without_heartbeat_expires(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = write_holder(tmp_path)
    with lock(tmp_path) as second:
        second.acquire()
        assert holder_in(tmp_path).pid == os.getpid()
    assert capsys.readouterr().err == (
        f"das_ds: output_dir: {tmp_path} was held by {gone}; waiting up to 0.6 s for its next heartbeat\n"
    )


def test_run_lock_remote_holder_with_heartbeat_is_held(tmp_path: Path) -> None:
    holder = write_holder(tmp_path)
    is_over = threading.Event()

    def beat() -> None:
        number = 0
        while not is_over.wait(BEAT_S):
            number += 1
            write_holder(tmp_path, token=holder.token, beat=number)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        second = RunLock(tmp_path, pytest.fail, beat_s=BEAT_S, stale_s=1e9)
        with pytest.raises(RunFolderError, match="held by another start, pid 4711 on node7"):
            second.acquire()
    finally:
        is_over.set()
        thread.join()


def test_run_lock_stale_file_system_lock_of_lost_node_is_ignored(tmp_path: Path) -> None:
    write_holder(tmp_path)
    with holding_process(tmp_path, only_lock_of_file_system=True), lock(tmp_path) as second:
        second.acquire()
        assert holder_in(tmp_path).pid == os.getpid() and holder_in(tmp_path).locked


def test_run_lock_other_container_is_judged_by_heartbeat(tmp_path: Path, without_file_system_locks: None) -> None:
    own = Holder.own()
    # This process, by a number that means nothing here.
    write_holder(tmp_path, kernel=own.kernel, pid=own.pid, pid_namespace="pid:[1]", locked=False)
    with lock(tmp_path) as second:
        second.acquire()


def test_run_lock_ended_container_is_free(tmp_path: Path) -> None:
    own = Holder.own()
    write_holder(tmp_path, kernel=own.kernel, pid=own.pid, pid_namespace="pid:[1]")
    with RunLock(tmp_path, pytest.fail, stale_s=1e9) as second:
        second.acquire()


def test_run_lock_without_file_system_locks_checks_process(tmp_path: Path, without_file_system_locks: None) -> None:
    own = Holder.own()
    write_holder(tmp_path, kernel=own.kernel, pid=own.pid, locked=False)
    with lock(tmp_path) as second, pytest.raises(RunFolderError, match=f"pid {own.pid} on node7"):
        second.acquire()
    for other in ({"pid": dead_pid()}, {"pid": own.pid, "create_time": own.create_time - 100}):
        write_holder(tmp_path, kernel=own.kernel, locked=False, **other)
        with RunLock(tmp_path, pytest.fail, stale_s=1e9) as second:
            second.acquire()


def test_run_lock_failed_heartbeat_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = []
    with lock(tmp_path) as one, caplog.at_level(logging.WARNING):
        one.acquire()
        write = os.pwrite

        def full(*_: Any) -> int:
            attempts.append(1)
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
        until(lambda: len(attempts) > 3)
        monkeypatch.setattr(os, "pwrite", write)
        before = holder_in(tmp_path).beat
        until(lambda: holder_in(tmp_path).beat > before)
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / LOCK_FILE} cannot be renewed (OSError: [Errno 28] No space left on device); training continues, "
        "but after 0.6 s a start on another node may take the folder"
    ]


def test_run_lock_removed_file_is_rewritten(tmp_path: Path) -> None:
    with lock(tmp_path) as one:
        one.acquire()
        (tmp_path / LOCK_FILE).unlink()
        until((tmp_path / LOCK_FILE).exists)
        until(lambda: (tmp_path / LOCK_FILE).stat().st_size > 0)
        assert holder_in(tmp_path).pid == os.getpid()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_new_file", [False, True])
def test_run_lock_lost_folder_calls_on_loss(tmp_path: Path, is_new_file: bool) -> None:
    said: list[str] = []
    with lock(tmp_path, on_loss=said.append) as one:
        one.acquire()
        other = take(tmp_path, is_new_file)
        until(lambda: bool(said))
    assert said == [f"output_dir: {tmp_path} was taken by another start, {other}; this one ends"]
    # What is the other's stays.
    assert holder_in(tmp_path) == other


def take(folder: Path, is_new_file: bool) -> Holder:
    if not is_new_file:
        return write_holder(folder, token="other")
    (folder / "new").mkdir()
    holder = write_holder(folder / "new", token="other")
    (folder / "new" / LOCK_FILE).replace(folder / LOCK_FILE)
    return holder


def test_run_lock_find_holder_for_preflight(tmp_path: Path) -> None:
    assert current_holder(tmp_path) is None
    with holding_process(tmp_path) as pid:
        holder = current_holder(tmp_path)
        assert holder is not None and holder.pid == pid
    assert current_holder(tmp_path) is None
    write_holder(tmp_path)
    assert current_holder(tmp_path) is not None
    os.utime(tmp_path / LOCK_FILE, (0, 0))
    assert current_holder(tmp_path) is None


def test_run_lock_folder_that_cannot_be_created_raises(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with lock(tmp_path / "run") as one, pytest.raises(RunFolderError, match="output_dir: cannot write to"):
        one.acquire()


@pytest.mark.parametrize("changes", [{"pid": "abc"}, {"pid": -5}, {"pid": 1.5}, {"create_time": "now"}])
def test_run_lock_file_with_invalid_types_is_free(changes: dict[str, Any], tmp_path: Path) -> None:
    content = {**asdict(Holder.own()), "kernel": "another", "locked": False, **changes}
    (tmp_path / LOCK_FILE).write_text(json.dumps(content).ljust(RECORD_BYTES))
    assert current_holder(tmp_path) is None
    with lock(tmp_path) as one:
        one.acquire()
        assert holder_in(tmp_path).pid == os.getpid()
