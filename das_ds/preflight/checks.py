"""The list of preflight checks: each runs on all ranks, and its result is one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from das_ds.errors import DasError

T = TypeVar("T")

Status = Literal["ok", "warning", "failed", "skipped"]
MAX_REASONS = 3
UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check."""

    check: str
    """Name of the check, one word."""
    status: Status
    found: str
    expected: str

    def line(self) -> str:
        """The result as one line of text."""
        expected = f" | expected: {self.expected}" if self.status in ("warning", "failed") else ""
        return f"{self.status:<8} {self.check:<10} {self.found}{expected}"


@dataclass(frozen=True)
class CheckWarning:
    """An outcome that need not stop a run."""

    found: str


class Gather(Protocol):
    """How ranks exchange values; implemented by `preflight.peers.PeerCheck`."""

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order, on every rank."""


class Checklist:
    """Runs checks and collects their results, which are the same on every rank.

    Args:
        peers: the ranks.
        show: called with every result as it is made.
    """

    def __init__(self, peers: Gather, show: Callable[[CheckResult], None]) -> None:
        self._peers = peers
        self._show = show
        self.results: list[CheckResult] = []

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [result.check for result in self.results if result.status == "failed"]

    def run(
        self, name: str, expected: str, probe: Callable[[], T], summarize: Callable[[list[T]], str | CheckWarning]
    ) -> list[T] | None:
        """Run one check: every rank probes, then all ranks judge the values of all.

        Args:
            name: of the check, one word.
            expected: what should be found.
            probe: called on this rank; raises DasError or OSError if the check fails here.
            summarize: values of all ranks -> text of the finding; raises DasError if they are inconsistent.

        Returns:
            The values of all ranks; None, on every rank, if the check failed.
        """
        outcomes = self._peers.gather(_attempt(probe))
        failures = {rank: outcome.reason for rank, outcome in enumerate(outcomes) if isinstance(outcome, _Failure)}
        values = [outcome for outcome in outcomes if not isinstance(outcome, _Failure)]
        if failures:
            self._add(CheckResult(name, "failed", group_reasons(failures, len(outcomes)), expected))
            return None
        summary = _attempt(lambda: summarize(values))
        if isinstance(summary, _Failure):
            self._add(CheckResult(name, "failed", summary.reason, expected))
            return None
        if isinstance(summary, CheckWarning):
            self._add(CheckResult(name, "warning", summary.found, expected))
        else:
            self._add(CheckResult(name, "ok", summary, expected))
        return values

    def skip(self, name: str, expected: str, *, needs: tuple[str, ...]) -> None:
        """Record a check that cannot be made because some of the checks in `needs` failed."""
        failed = " and ".join(check for check in needs if check in self.failed)
        self._add(CheckResult(name, "skipped", f"not checked, because {failed} failed", expected))

    def _add(self, result: CheckResult) -> None:
        self.results.append(result)
        self._show(result)


@dataclass(frozen=True)
class _Failure:
    """Sent by a rank in place of a value."""

    reason: str


def _attempt(function: Callable[[], T]) -> T | _Failure:
    try:
        return function()
    except (DasError, OSError) as error:
        return _Failure(str(error))


def group_reasons(failures: dict[int, str], num_ranks: int) -> str:
    """Each reason once, with the first rank that has it and how many others; no ranks if all have the same reason."""
    ranks: dict[str, list[int]] = {}
    for rank, reason in failures.items():
        ranks.setdefault(reason, []).append(rank)
    if len(failures) == num_ranks and len(ranks) == 1:
        return next(iter(ranks))
    shown = [f"{_format_ranks(failed)}: {reason}" for reason, failed in ranks.items()]
    more = f"; and {len(shown) - MAX_REASONS} other reasons" if len(shown) > MAX_REASONS else ""
    return "; ".join(shown[:MAX_REASONS]) + more


def _format_ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" + (f" and {len(ranks) - 1} more" if len(ranks) > 1 else "")


def format_bytes(num_bytes: float) -> str:
    """A size in bytes as text with a unit."""
    for unit, size in UNITS.items():
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"
