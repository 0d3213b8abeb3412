"""Requests to stop that reach ranks through, or past, the real DeepSpeed launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from das_ds.errors import EXIT_STOPPED
from das_ds.fault_tolerance.launcher_guard import is_alive
from helpers.commands import QUICK_START
from helpers.ports import reserve_port

pytestmark = pytest.mark.multirank

REPOSITORY = Path(__file__).resolve().parents[2]
SLOW_SAVE_S = 40.0
"""Longer than the 30 seconds after which the launcher kills."""


@dataclass(frozen=True)
class Job:
    """A started `deepspeed` command and what it has started."""

    command: subprocess.Popen[bytes]
    launch: psutil.Process
    ranks: list[psutil.Process]
    folder: Path


def start(folder: Path, *, save_s: float = 0.0) -> Job:
    """Two ranks in a loop of steps; returns once both are at it."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        "2",
        "--master_port",
        str(reserve_port()),
    ]
    with (folder / "log").open("wb") as log:
        command = subprocess.Popen(
            [
                *launcher,
                "--master_port",
                str(reserve_port()),
                "--module",
                "helpers.stopping",
                str(folder),
                "--save-s",
                str(save_s),
            ],
            env={**os.environ, "PYTHONPATH": path, **QUICK_START},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    files = [folder / f"pid-{rank}" for rank in range(2)]
    deadline = time.monotonic() + 120
    while not all(file.exists() for file in files):
        assert command.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.1)
    ranks = [psutil.Process(int(file.read_text())) for file in files]
    launch = ranks[0].parent()
    assert launch is not None
    return Job(command, launch, ranks, folder)


def stopped_step(job: Job, reason: str) -> int:
    """The step at which both ranks stopped for `reason`, after all processes of the job have ended."""
    deadline = time.monotonic() + 120
    while any(is_alive(process) for process in [*job.ranks, job.launch]):
        assert time.monotonic() < deadline, "time ran out; left: " + (job.folder / "log").read_text()
        time.sleep(0.1)
    found = [(job.folder / f"stopped-{rank}").read_text().split(": ", 1) for rank in range(2)]
    assert found[0] == found[1] and found[0][1] == reason
    return int(found[0][0])


def terminate_command(job: Job) -> str:
    job.command.terminate()
    return f"the launcher (pid {job.command.pid}) is gone (all ranks)"


def interrupt_group(job: Job) -> str:
    os.killpg(job.command.pid, signal.SIGINT)
    return "SIGINT (all ranks)"


def terminate_launch(job: Job) -> str:
    job.launch.terminate()
    return "SIGTERM (rank 0)"


def signal_one_rank(job: Job) -> str:
    job.ranks[1].send_signal(signal.SIGUSR2)
    return "SIGUSR2 (rank 1)"


@pytest.mark.parametrize(
    ("ask", "code"), [(terminate_command, -signal.SIGTERM), (terminate_launch, 1), (signal_one_rank, EXIT_STOPPED)]
)
def test_both_ranks_stop_at_the_same_step(ask: Callable[[Job], str], code: int, tmp_path: Path) -> None:
    job = start(tmp_path)
    assert stopped_step(job, ask(job)) > 2
    assert job.command.wait(10) == code


@pytest.mark.slow
@pytest.mark.parametrize("ask", [terminate_launch, interrupt_group])
def test_a_save_may_take_longer_than_the_launcher_waits(ask: Callable[[Job], str], tmp_path: Path) -> None:
    job = start(tmp_path, save_s=SLOW_SAVE_S)
    began = time.monotonic()
    stopped_step(job, ask(job))
    assert time.monotonic() - began > SLOW_SAVE_S
    job.command.wait(10)
