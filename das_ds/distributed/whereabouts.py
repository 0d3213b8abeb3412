"""Where each rank stands as the others know it, and which of them is to blame when nothing moves any more."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from pydantic import BaseModel, ConfigDict

_PACKAGE = f"{Path(__file__).parents[1]}/"
# The innermost Python frame of a thread that waits for other ranks.
_COLLECTIVE_FILES = ("/torch/distributed/", "/deepspeed/comm/", "/das_ds/distributed/agreement.py")
_WAITS_OF_DEEPSPEED = ("wait", "synchronize")


class Row(BaseModel):
    """What a rank says about itself once a second."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int
    host: str
    pid: int
    beat: int
    """Counts the rows of this rank."""
    phase: str
    place: str
    step: int
    progress: tuple[int, int]
    """Steps begun, and places passed since; equal on ranks that are equally far."""
    idle: float
    """Seconds since the main thread last said where it stands."""
    patient: bool
    """Where it stands may take any time."""
    waits: bool
    """It is inside a collective, so it waits for others."""
    frame: str
    """The innermost line of das_ds that it runs."""
    left: str | None = None
    """The error with which it has left."""

    @property
    def standing(self) -> str:
        step = [f"step {self.step} of {self.phase}"] if self.phase else []
        return ", ".join([*step, self.place])


@dataclass(frozen=True)
class Sight:
    """A rank's row as another rank has it."""

    row: Row
    age: float
    """Seconds since it was last renewed."""

    @property
    def idle(self) -> float:
        """Seconds without progress, as far as is known."""
        return self.row.idle + self.age


def culprits(sights: Sequence[Sight], *, silent_after: float, hang_timeout: float) -> list[Sight]:
    """Who holds up a run in which nothing moves.

    First those whose rows are no longer renewed; else of those that stand still outside a collective the ones that are
    least far; if all are inside one, the least far of all.
    """
    present = [sight for sight in sights if sight.row.left is None]
    if silent := [sight for sight in present if sight.age > silent_after]:
        return silent
    working = [
        sight for sight in present if not sight.row.waits and not sight.row.patient and sight.idle >= hang_timeout / 2
    ]
    suspects = working or present
    least = min((sight.row.progress for sight in suspects), default=None)
    return [sight for sight in suspects if sight.row.progress == least]


def silence_text(sight: Sight) -> str:
    """A rank that is frozen, or dead without anyone being told."""
    return f"{_name(sight.row)} has given no sign of life for {sight.age:.0f} s; it stood at: {sight.row.standing}"


def stillness_text(sight: Sight) -> str:
    """A rank whose main thread is stuck."""
    where = f"{sight.row.standing}; {sight.row.frame}"
    return f"{_name(sight.row)} has made no progress for {sight.idle:.0f} s; it stands at: {where}"


def loss_text(sight: Sight) -> str:
    """A rank that has ended."""
    name, ago = _name(sight.row), f"{sight.idle:.0f} s ago"
    if sight.row.left is not None:
        return f"{name} has left with {sight.row.left}; it stood at: {sight.row.standing}"
    return f"{name} is gone; its last sign of life: {sight.row.standing}, {ago}"


def stack_position(thread: int) -> tuple[bool, str]:
    """Whether a thread of this process waits inside a collective, and the innermost line of das_ds that it runs."""
    frames = sys._current_frames()
    if thread not in frames:
        return False, "ended"
    own = threading.get_ident()
    # Backward passes on a GPU run hooks, and their collectives, in threads of autograd.
    waits = any(_is_in_collective(frame) for ident, frame in frames.items() if ident != own)
    return waits, _innermost_line(frames[thread])


def _is_in_collective(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    if any(part in file for part in _COLLECTIVE_FILES):
        return True
    return "/deepspeed/" in file and frame.f_code.co_name in _WAITS_OF_DEEPSPEED


def _innermost_line(innermost: FrameType) -> str:
    frame: FrameType | None = innermost
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    found = frame or innermost
    file = found.f_code.co_filename.removeprefix(str(Path(_PACKAGE).parent) + "/")
    return f"{file}:{found.f_lineno} {found.f_code.co_name}"


def _name(row: Row) -> str:
    return f"rank {row.rank} (pid {row.pid} on {row.host})"
