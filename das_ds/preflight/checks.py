"""Checks that all ranks make together, one line each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from das_ds.errors import DasError

T = TypeVar("T")

Status = Literal["ok", "warning", "failed", "skipped"]
MOST_REASONS = 3
UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check."""

    check: str
    status: Status
    found: str
    expected: str

    def line(self) -> str:
        """For people."""
        expected = f" | expected: {self.expected}" if self.status in ("warning", "failed") else ""
        return f"{self.status:<8} {self.check:<10} {self.found}{expected}"


@dataclass(frozen=True)
class CheckWarning:
    """What was found, where it need not stop a run."""

    found: str


class Gather(Protocol):
    """How ranks exchange what they found; `preflight.peers.PeerCheck` does it."""

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order, on every rank."""


class Checklist:
    """Runs checks and keeps their findings, the same on every rank.

    Args:
        peers: the ranks.
        show: called with every finding as it is made.
    """

    def __init__(self, peers: Gather, show: Callable[[CheckResult], None]) -> None:
        self._peers, self._show = peers, show
        self.findings: list[CheckResult] = []

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [finding.check for finding in self.findings if finding.status == "failed"]

    def run(
        self, name: str, expected: str, look: Callable[[], T], check_loss: Callable[[list[T]], str | CheckWarning]
    ) -> list[T] | None:
        """One check: every rank looks, then all judge what they saw.

        Args:
            name: of the check, one word.
            expected: what has to be found.
            look: on this rank; raises DasError or OSError where the rank's own part fails.
            judge: values of all ranks -> what was found; raises DasError where they do not fit together.

        Returns:
            What all ranks saw; None where the check failed, on every rank.
        """
        seen = self._peers.gather(_attempt(look))
        failures = {rank: value.reason for rank, value in enumerate(seen) if isinstance(value, _Failure)}
        values = [value for value in seen if not isinstance(value, _Failure)]
        judged = (
            _attempt(lambda: check_loss(values)) if not failures else _Failure(reasons_by_rank(failures, len(seen)))
        )
        if isinstance(judged, _Failure):
            self._add(CheckResult(name, "failed", judged.reason, expected))
            return None
        if isinstance(judged, CheckWarning):
            self._add(CheckResult(name, "warning", judged.found, expected))
        else:
            self._add(CheckResult(name, "ok", judged, expected))
        return values

    def skip(self, name: str, expected: str, *, needs: tuple[str, ...]) -> None:
        """Note a check that cannot be made because others, those of `needs`, failed."""
        failed = " and ".join(check for check in needs if check in self.failed)
        self._add(CheckResult(name, "skipped", f"not checked, because {failed} failed", expected))

    def _add(self, finding: CheckResult) -> None:
        self.findings.append(finding)
        self._show(finding)


@dataclass(frozen=True)
class _Failure:
    """What a rank says instead of a value."""

    reason: str


def _attempt(look: Callable[[], T]) -> T | _Failure:
    try:
        return look()
    except (DasError, OSError) as error:
        return _Failure(str(error))


def reasons_by_rank(failures: dict[int, str], num_ranks: int) -> str:
    """Each reason once, with the first rank that has it and how many others; no rank where all have the same."""
    ranks: dict[str, list[int]] = {}
    for rank, reason in failures.items():
        ranks.setdefault(reason, []).append(rank)
    if len(failures) == num_ranks and len(ranks) == 1:
        return next(iter(ranks))
    shown = [f"{_named(having)}: {reason}" for reason, having in ranks.items()]
    more = f"; and {len(shown) - MOST_REASONS} other reasons" if len(shown) > MOST_REASONS else ""
    return "; ".join(shown[:MOST_REASONS]) + more


def _named(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" + (f" and {len(ranks) - 1} more" if len(ranks) > 1 else "")


def readable(num_bytes: float) -> str:
    """A size for people."""
    for unit, size in UNITS.items():
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"
