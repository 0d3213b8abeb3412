"""Launcher guard: finds the launcher above a rank, and keeps DeepSpeed's launcher from killing ranks that still save.

- A rank whose launcher is gone has to shut down: SIGTERM or SIGKILL to the `deepspeed` command, or a signal that ends
  `deepspeed.launcher.launch`, leaves the ranks running without a process that waits for them.
- On SIGTERM or SIGINT `deepspeed.launcher.launch` (DeepSpeed 0.19) ends one rank after the other, waits up to 30
  seconds for each and then sends SIGKILL. It has no option for more time, but it can be suspended: this module, run as
  a program, sends it SIGSTOP, waits until its ranks have ended, and lets it continue.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from das_ds.thread_guard import ThreadGuard

ENDING_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})
"""Those that end a launcher, which then ends its ranks."""
DEEPSPEED_LAUNCH = "deepspeed.launcher.launch"
"""The module that starts the ranks of one node."""
_PROGRAMS = {
    DEEPSPEED_LAUNCH,
    "deepspeed.launcher.runner",
    "torch.distributed.run",
    "torch.distributed.launch",
    "deepspeed",
    "deepspeed.pt",
    "ds",
    "torchrun",
}
POLL_S = 0.2
STRAGGLERS_S = 30.0
"""Once a rank has ended, the launcher continues after this time at the latest: ranks that have saved end together."""


def find_launchers() -> list[psutil.Process]:
    """The DeepSpeed and torchrun launchers among this process's ancestors, nearest first."""
    return [ancestor for ancestor in psutil.Process().parents() if program_name(_command(ancestor)) in _PROGRAMS]


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs as the same process; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def program_name(command: Sequence[str]) -> str | None:
    """Module, or file name of the script, that a Python command line runs; None for other commands."""
    if not command or not Path(command[0]).name.startswith("python"):
        return None
    for position, argument in enumerate(command[1:], start=1):
        if argument == "-m":
            return command[position + 1] if position + 1 < len(command) else None
        if not argument.startswith("-"):
            return Path(argument).name
    return None


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


class LauncherGuard:
    """Suspends DeepSpeed's launcher as soon as SIGTERM or SIGINT arrives, even in the middle of a step.

    Python's signal handlers run between two bytecode instructions, and a step may take longer than the launcher waits.
    The number of a signal, however, is written to the wake-up descriptor at once, where a thread reads it. One rank per
    node does so.

    Args:
        launchers: see `find_launchers`.
        limit_s: longest time for which the launcher is suspended.
    """

    def __init__(self, launchers: Sequence[Any], limit_s: float) -> None:
        self._launcher = next((one for one in launchers if program_name(one.cmdline()) == DEEPSPEED_LAUNCH), None)
        self._limit_s = limit_s
        self._num_ranks = int(os.environ.get("LOCAL_SIZE", "1"))
        self._is_on = self._launcher is not None and os.environ.get("LOCAL_RANK") == "0"
        if self._is_on:
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._run, name="launcher-guard", daemon=True).start()

    def close(self) -> None:
        """Stop watching for signals."""
        if self._is_on:
            signal.set_wakeup_fd(self._previous_fd)
            # The thread reads the end of the stream and returns.
            self._writer.close()

    def _run(self) -> None:
        # Inherited by the program that suspends the launcher: launchers and SLURM signal every descendant of a rank,
        # and if that program ended early the launcher would remain suspended.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        guard = ThreadGuard("the launcher cannot be suspended: it may kill ranks before they have saved")
        with guard, self._reader:
            while signal_numbers := self._reader.recv(64):
                if ENDING_SIGNALS & set(signal_numbers):
                    suspend_launcher(self._launcher, self._num_ranks, self._limit_s)
                    return


def suspend_launcher(launcher: psutil.Process, num_ranks: int, limit_s: float) -> None:
    """Suspend a launcher until all its ranks have ended, or until `limit_s` seconds have passed; returns at once.

    Does nothing unless all of its `num_ranks` ranks run: a launcher that has lost a rank has to end the others.

    Raises:
        subprocess.CalledProcessError: the program that suspends it does not start.
    """
    identity = [str(launcher.pid), repr(launcher.create_time())]
    command = [sys.executable, "-m", __spec__.name, *identity, str(num_ranks), str(limit_s)]
    subprocess.run(
        command,
        # Where this package is found, installed or not.
        cwd=Path(__file__).parents[2],
        # Neither Ctrl-C at the terminal nor a signal to the launcher's process group may end it.
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )


def _hold(launcher: psutil.Process, num_ranks: int, limit_s: float) -> None:
    # A suspended launcher does not wait for its ranks, so those that have ended remain as zombies.
    ranks = [rank for rank in launcher.children() if is_alive(rank)]
    if len(ranks) < num_ranks:
        return
    deadline = time.monotonic() + limit_s
    launcher.suspend()
    try:
        while ranks and time.monotonic() < deadline:
            time.sleep(POLL_S)
            alive = [rank for rank in ranks if is_alive(rank)]
            if len(alive) < len(ranks):
                deadline = min(deadline, time.monotonic() + STRAGGLERS_S)
            ranks = alive
    finally:
        launcher.resume()


def _main(pid: int, create_time: float, num_ranks: int, limit_s: float) -> None:
    # Forked, so that init adopts this process: the launcher also ends all descendants of its ranks.
    if os.fork():
        os._exit(0)
    launcher = psutil.Process(pid)
    if launcher.create_time() == create_time:
        _hold(launcher, num_ranks, limit_s)


if __name__ == "__main__":
    _main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
