"""The launcher processes above this rank: a rank whose launcher is gone works for nobody.

SIGTERM or SIGKILL to the `deepspeed` command, or a signal that ends `deepspeed.launcher.launch`, leaves the ranks
running without anyone who waits for them.
"""

from __future__ import annotations

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
