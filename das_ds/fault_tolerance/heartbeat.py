"""Heartbeats of the ranks, and the rule that identifies the stalled one when nothing makes progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict


class Heartbeat(BaseModel):
    """Status of a rank, published once a second."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int
    host: str
    pid: int
    seq: int
    """Counts the heartbeats of this rank."""
    phase: str
    location: str
    step: int
    progress: tuple[int, int]
    """Steps begun, and locations passed since; ranks with equal progress are at the same point."""
    idle_s: float
    """Seconds since the main thread last made progress or entered or left a collective."""
    timeout_suspended: bool
    """Whether its current location may take any time."""
    in_collective: bool | None
    """Whether it waits for other ranks in a collective. None: unknown, as in a step, where DeepSpeed may wait."""
    stack_location: str = ""
    """The innermost line of das_ds that it executes; known only where a stall is suspected."""
    exit_error: str | None = None
    """The error with which it exited."""

    @property
    def description(self) -> str:
        """Its location in words."""
        step = [f"step {self.step} of {self.phase}"] if self.phase else []
        return ", ".join([*step, self.location])

    @property
    def name(self) -> str:
        """Rank, process and host."""
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


@dataclass(frozen=True)
class PeerStatus:
    """A rank's last heartbeat as another rank received it."""

    heartbeat: Heartbeat
    age_s: float
    """Seconds since it arrived."""

    @property
    def idle_s(self) -> float:
        """Seconds without known progress."""
        return self.heartbeat.idle_s + self.age_s

    def may_be_busy(self, hang_timeout: float) -> bool:
        """Whether it may be working, so that waiting for it is not a hang."""
        if self.heartbeat.in_collective:
            return False
        return self.idle_s <= hang_timeout or (self.heartbeat.timeout_suspended and self.age_s <= hang_timeout)


def find_stalled_ranks(statuses: Sequence[PeerStatus], hang_timeout: float) -> list[PeerStatus]:
    """The ranks that block a run in which nothing has made progress for `hang_timeout` seconds.

    Those without heartbeats, if any; else, of the ranks that are stalled outside a collective, those with the least
    progress; if all wait in a collective, the ones with the least progress of all.
    """
    present = [status for status in statuses if status.heartbeat.exit_error is None]
    if silent := [status for status in present if status.age_s > hang_timeout / 2]:
        return silent
    working = [
        status
        for status in present
        if not status.heartbeat.in_collective
        and not status.heartbeat.timeout_suspended
        and status.idle_s >= hang_timeout / 2
    ]
    suspects = working or present
    least = min((status.heartbeat.progress for status in suspects), default=None)
    return [status for status in suspects if status.heartbeat.progress == least]


def describe_unresponsive(status: PeerStatus) -> str:
    """Message for a rank whose process is frozen, or ended without an error."""
    beat = status.heartbeat
    return f"{beat.name} has not sent a heartbeat for {status.age_s:.0f} s; last location: {beat.description}"


def describe_stalled(status: PeerStatus) -> str:
    """Message for a rank whose main thread is stuck."""
    beat = status.heartbeat
    location = "; ".join(filter(None, (beat.description, beat.stack_location)))
    return f"{beat.name} has made no progress for {status.idle_s:.0f} s; current location: {location}"


def describe_lost(status: PeerStatus) -> str:
    """Message for a rank whose process has ended."""
    beat = status.heartbeat
    if beat.exit_error is not None:
        return f"{beat.name} exited with {beat.exit_error}; last location: {beat.description}"
    return f"{beat.name} is gone; last heartbeat: {beat.description}, {status.idle_s:.0f} s ago"
