"""Stack dump: the stacks of all threads of this process, read only when a stall is suspected.

Frames of a running thread must not be walked in Python: CPython 3.11 may free them meanwhile and crash.
`faulthandler` reads them in C, at once, while no other thread runs Python. Even so it is no part of a healthy run:
under stress, with stacks read without a pause, CPython 3.11 has been seen to crash in it.
"""

from __future__ import annotations

import faulthandler
import re
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

_PACKAGE = f"{Path(__file__).parents[1]}/"
# Files of the innermost Python frame of a thread that waits for other ranks.
_COLLECTIVE_FILES = ("/torch/distributed/", "/deepspeed/comm/")
_WAITS_OF_DEEPSPEED = ("wait", "synchronize")
_THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)")
_FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')


@dataclass(frozen=True)
class Frame:
    """One line of a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file.removeprefix(str(Path(_PACKAGE).parent) + '/')}:{self.line} {self.function}"

    @property
    def waits_for_ranks(self) -> bool:
        """Whether a thread with this innermost frame waits inside a collective."""
        if any(part in self.file for part in _COLLECTIVE_FILES):
            return True
        return "/deepspeed/" in self.file and self.function in _WAITS_OF_DEEPSPEED


@dataclass(frozen=True)
class StackReport:
    """Status of the main thread, as the stacks of the process show it."""

    in_collective: bool | None = None
    """Whether it waits inside a collective; None: unknown."""
    location: str = ""
    """The innermost line of das_ds that it executes; empty: unknown."""


def inspect_stacks(main_thread: int) -> StackReport:
    """Read the stacks of all threads.

    Args:
        main_thread: identity of the thread that trains.
    """
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        stacks = parse_stacks(file.read().decode(errors="replace"))
    frames = stacks.get(main_thread)
    if not frames:
        return StackReport()
    # All threads but this one: on a GPU, autograd's threads run the hooks of backward passes and their collectives.
    stacks_of_others = [frames for thread, frames in stacks.items() if frames and thread != threading.get_ident()]
    innermost = next((frame for frame in frames if frame.file.startswith(_PACKAGE)), frames[0])
    return StackReport(any(frames[0].waits_for_ranks for frames in stacks_of_others), str(innermost))


def parse_stacks(dump: str) -> dict[int, list[Frame]]:
    """Thread -> its frames, the innermost first, from the text that `faulthandler` writes."""
    stacks: dict[int, list[Frame]] = {}
    frames: list[Frame] = []
    for line in dump.splitlines():
        if thread := _THREAD.match(line):
            frames = stacks[int(thread[1], 16)] = []
        elif frame := _FRAME.match(line):
            frames.append(Frame(frame[1], int(frame[2]), frame[3]))
    return stacks
