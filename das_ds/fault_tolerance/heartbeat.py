"""What a rank says about itself, and which ranks are to blame when nothing moves any more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict


class Heartbeat(BaseModel):
    """What a rank says about itself once a second."""

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
    """Steps begun, and locations passed since; equal on ranks that are equally far."""
    idle_s: float
    """Seconds since the main thread last made progress or entered or left a collective."""
    timeout_suspended: bool
    """Where it stands may take any time."""
    in_collective: bool | None
    """Whether it waits for others inside a collective. None: unknown, as in a step, where DeepSpeed may wait."""
    stack_location: str = ""
    """The innermost line of das_ds that it runs; known only where a stall is suspected."""
    exit_error: str | None = None
    """The error with which it has left."""

    @property
    def description(self) -> str:
        """Where it stands, in words."""
        step = [f"step {self.step} of {self.phase}"] if self.phase else []
        return ", ".join([*step, self.location])

    @property
    def name(self) -> str:
        """Which process it is."""
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


@dataclass(frozen=True)
class PeerStatus:
    """A rank's last heartbeat as another rank has it."""

    heartbeat: Heartbeat
    age_s: float
    """Seconds since it came."""

    @property
    def idle_s(self) -> float:
        """Seconds without progress, as far as is known."""
        return self.heartbeat.idle_s + self.age_s

    def may_be_busy(self, hang_timeout: float) -> bool:
        """Whether it may be working, so that to wait for it is no fault."""
        if self.heartbeat.in_collective:
            return False
        return self.idle_s <= hang_timeout or (self.heartbeat.timeout_suspended and self.age_s <= hang_timeout)


def find_stalled_ranks(statuses: Sequence[PeerStatus], hang_timeout: float) -> list[PeerStatus]:
    """Who holds up a run in which nothing has moved for `hang_timeout`.

    First those that send no heartbeats; else of those that stand still outside a collective the ones that are least
    far; if all are inside one, the least far of all.
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
    """A rank that is frozen, or dead without anyone being told."""
    beat = status.heartbeat
    return f"{beat.name} has given no sign of life for {status.age_s:.0f} s; it stood at: {beat.description}"


def describe_stalled(status: PeerStatus) -> str:
    """A rank whose main thread is stuck."""
    beat = status.heartbeat
    where = "; ".join(filter(None, (beat.description, beat.stack_location)))
    return f"{beat.name} has made no progress for {status.idle_s:.0f} s; it stands at: {where}"


def describe_lost(status: PeerStatus) -> str:
    """A rank that has ended."""
    beat = status.heartbeat
    if beat.exit_error is not None:
        return f"{beat.name} has left with {beat.exit_error}; it stood at: {beat.description}"
    return f"{beat.name} is gone; its last sign of life: {beat.description}, {status.idle_s:.0f} s ago"
