"""The launcher processes above this rank: a rank whose launcher is gone works for nobody.

SIGTERM or SIGKILL to the `deepspeed` command, or a signal that ends `deepspeed.launcher.launch`, leaves the ranks
running without anyone who waits for them.

Gives ranks that save more than the 30 seconds after which the DeepSpeed launcher kills them.

On SIGTERM or SIGINT `deepspeed.launcher.launch` ends one rank after the other, waits up to 30 seconds for each and then
sends SIGKILL. Nothing can be told to it, but it can be stopped: this module, run as a program of its own, sends it
SIGSTOP, waits until its ranks have gone, and lets it continue; it then finds all of them ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

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


def launchers() -> list[psutil.Process]:
    """The DeepSpeed and torchrun launchers among this process's ancestors, nearest first."""
    return [ancestor for ancestor in psutil.Process().parents() if program(_command(ancestor)) in _PROGRAMS]


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs as the same process; one that has ended but is not yet waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def program(command: Sequence[str]) -> str | None:
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


POLL_S = 0.2
STRAGGLERS_S = 30.0
"""Ranks that have saved end together; those left behind by one that has ended are the launcher's again after this."""


def suspend_launcher(launcher: psutil.Process, num_ranks: int, limit_s: float) -> None:
    """Stop a launcher until all its ranks have ended, or until `limit_s` seconds have passed; returns at once.

    Nothing is done unless all of its `num_ranks` ranks run: a launcher also ends those that have lost one of them.

    Raises:
        subprocess.CalledProcessError: the process that pauses it does not start.
    """
    identity = [str(launcher.pid), repr(launcher.create_time())]
    command = [sys.executable, "-m", __spec__.name, *identity, str(num_ranks), str(limit_s)]
    # Its own session: neither Ctrl-C at the terminal nor a signal to the launcher's group may end it.
    subprocess.run(
        command,
        # Where this package is found, installed or not.
        cwd=Path(__file__).parents[2],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )


def _hold(launcher: psutil.Process, num_ranks: int, limit_s: float) -> None:
    # A stopped launcher does not wait for its ranks: those that have ended remain as zombies.
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
    # The launcher also ends what its ranks have started; a process whose parent has left is nobody's descendant.
    if os.fork():
        os._exit(0)
    launcher = psutil.Process(pid)
    if launcher.create_time() == create_time:
        _hold(launcher, num_ranks, limit_s)


if __name__ == "__main__":
    _main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
