"""Requests to stop or save that one process sees."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from das_ds.fault_tolerance import launcher_guard, shutdown
from das_ds.fault_tolerance.launcher_guard import is_alive, program_name, suspend_launcher
from das_ds.fault_tolerance.shutdown import ShutdownHandler, ShutdownRequest
from das_ds.run_dir import RunDir
from helpers.waiting import until

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
FAKE_LAUNCHER = """
import subprocess, sys
ranks = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
print(*(rank.pid for rank in ranks), flush=True)
for rank in ranks: rank.wait()
"""


@pytest.mark.parametrize("name", SIGNALS)
def test_shutdown_handler_signal_requests_stop_and_restores_handler(name: str, tmp_path: Path) -> None:
    number = signal.Signals[name]
    former = signal.getsignal(number)
    with ShutdownHandler(RunDir(tmp_path), SIGNALS) as handler:
        assert handler.poll(files=True) == ShutdownRequest(stop=None, save=False)
        os.kill(os.getpid(), number)
        assert handler.poll(files=False) == ShutdownRequest(stop=name, save=False)
        assert handler.poll(files=False).stop == name
    assert signal.getsignal(number) is former


def test_shutdown_handler_ignored_signal_is_handled_only_if_configured(tmp_path: Path) -> None:
    former = signal.signal(signal.SIGUSR1, signal.SIG_IGN), signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        with ShutdownHandler(RunDir(tmp_path), ["SIGUSR1"]) as handler:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert handler.poll(files=False).stop is None
            os.kill(os.getpid(), signal.SIGUSR1)
            assert handler.poll(files=False).stop == "SIGUSR1"
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, former[0])
        signal.signal(signal.SIGUSR2, former[1])


def test_shutdown_handler_second_interrupt_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(shutdown.time, "monotonic", lambda: now[0])
    with ShutdownHandler(RunDir(tmp_path), ["SIGINT"]) as handler:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += shutdown.INSIST_AFTER_S - 0.1
        os.kill(os.getpid(), signal.SIGINT)
        assert handler.poll(files=False).stop == "SIGINT"
        now[0] += 0.1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_shutdown_handler_stop_file_requests_stop_until_removed(tmp_path: Path) -> None:
    handler = ShutdownHandler(RunDir(tmp_path), [])
    (tmp_path / "STOP").touch()
    assert handler.poll(files=False).stop is None
    assert handler.poll(files=True) == ShutdownRequest(stop="the file STOP", save=False)
    handler.remove_stop_file()
    handler.remove_stop_file()
    assert not (tmp_path / "STOP").exists()
    assert ShutdownHandler(RunDir(tmp_path), []).poll(files=True).stop is None


def test_shutdown_handler_save_file_requests_one_save(tmp_path: Path) -> None:
    handler = ShutdownHandler(RunDir(tmp_path), [])
    file = tmp_path / "SAVE"
    handler.remove_save_file()
    file.touch()
    assert [handler.poll(files=False).save, handler.poll(files=True).save] == [False, True]
    assert not handler.poll(files=True).save
    handler.remove_save_file()
    assert not file.exists() and not handler.poll(files=True).save
    for second in (1, 2):
        file.touch()
        os.utime(file, (second, second))
        assert handler.poll(files=True).save
        # Written again while the checkpoint was saved.
        os.utime(file, (second + 10, second + 10))
        handler.remove_save_file()
        assert file.exists() and handler.poll(files=True).save
        handler.remove_save_file()
        assert not file.exists()


@pytest.mark.parametrize("is_waited_for", [True, False])
def test_shutdown_handler_launcher_gone_requests_stop(
    is_waited_for: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(shutdown, "find_launchers", lambda: [psutil.Process(launcher.pid)])
    monkeypatch.setattr(shutdown, "LAUNCHER_CHECK_S", 0.0)
    handler = ShutdownHandler(RunDir(tmp_path), [])
    assert handler.poll(files=False).stop is None
    launcher.kill()
    if is_waited_for:
        launcher.wait()
    else:
        until(lambda: psutil.Process(launcher.pid).status() == psutil.STATUS_ZOMBIE)
    assert handler.poll(files=False).stop == f"the launcher (pid {launcher.pid}) is gone"
    launcher.wait()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python -u -m deepspeed.launcher.launch --world_info=x train.py", "deepspeed.launcher.launch"),
        ("/opt/python3.11 /opt/bin/deepspeed --num_gpus 2 train.py", "deepspeed"),
        ("/usr/bin/python3 -P /opt/bin/torchrun train.py", "torchrun"),
        ("python launch/train.py deepspeed", "train.py"),
        ("bash -c deepspeed", None),
        ("nohup deepspeed train.py", None),
        ("python -m", None),
        ("python -u", None),
        ("", None),
    ],
)
def test_program_name_of_command_lines(command: str, expected: str | None) -> None:
    assert program_name(command.split()) == expected


@pytest.fixture
def fake_launcher() -> Iterator[tuple[psutil.Process, list[psutil.Process]]]:
    """A process that waits for two children, as the launcher waits for its ranks."""
    started = subprocess.Popen([sys.executable, "-c", FAKE_LAUNCHER], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    ranks = [psutil.Process(int(pid)) for pid in started.stdout.readline().split()]
    yield psutil.Process(started.pid), ranks
    for process in ranks:
        if process.is_running():
            process.kill()
    started.kill()
    started.wait()
    started.stdout.close()


def test_suspend_launcher_until_ranks_have_ended(
    fake_launcher: tuple[psutil.Process, list[psutil.Process]],
) -> None:
    launcher, ranks = fake_launcher
    suspend_launcher(launcher, 2, 60.0)
    until(lambda: launcher.status() == psutil.STATUS_STOPPED)
    assert not [child for child in launcher.children() if child not in ranks]
    ranks[0].kill()
    until(lambda: not is_alive(ranks[0]))
    assert launcher.status() == psutil.STATUS_STOPPED
    ranks[1].kill()
    until(lambda: not is_alive(launcher))


def test_suspend_launcher_until_limit(
    fake_launcher: tuple[psutil.Process, list[psutil.Process]],
) -> None:
    launcher, ranks = fake_launcher
    suspend_launcher(launcher, 2, 2.0)
    until(lambda: launcher.status() == psutil.STATUS_STOPPED)
    until(lambda: launcher.status() != psutil.STATUS_STOPPED)
    assert all(is_alive(rank) for rank in ranks)


def test_suspend_launcher_with_lost_rank_does_nothing(
    fake_launcher: tuple[psutil.Process, list[psutil.Process]], monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher, _ = fake_launcher
    suspended: list[int] = []
    monkeypatch.setattr(psutil.Process, "suspend", lambda process: suspended.append(process.pid))
    launcher_guard._hold(launcher, 3, 0.0)
    assert not suspended
    launcher_guard._hold(launcher, 2, 0.0)
    assert suspended == [launcher.pid]


def test_launcher_guard_failure_is_logged_and_stop_requested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise psutil.NoSuchProcess(1)

    launcher = SimpleNamespace(cmdline=lambda: ["python", "-m", "deepspeed.launcher.launch"])
    monkeypatch.setattr(shutdown, "find_launchers", lambda: [launcher])
    monkeypatch.setattr(shutdown, "is_alive", lambda process: True)
    monkeypatch.setattr(launcher_guard, "suspend_launcher", fail)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with ShutdownHandler(RunDir(tmp_path), ["SIGTERM"]) as handler:
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: "the launcher cannot be suspended" in caplog.text)
        assert "NoSuchProcess" in caplog.text and handler.poll(files=False).stop == "SIGTERM"
