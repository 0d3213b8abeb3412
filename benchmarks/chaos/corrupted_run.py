"""A stopped run whose checkpoints are damaged before it is continued."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

from benchmarks.chaos.corruptions import CORRUPTIONS
from benchmarks.chaos.job import DOMAINS
from benchmarks.chaos.job_processes import NUM_RANKS
from benchmarks.chaos.outcome import differences, outcome
from benchmarks.chaos.track import checkpoints_of, first_batch
from benchmarks.chaos.trail import TRAINING, Mark, Trail
from benchmarks.chaos.undisturbed import Undisturbed
from das_ds.errors import EXIT_STOPPED, EXIT_USER_ERROR

NEWEST, NEWEST_TWO, OLDER, ALL = "the newest", "the newest two", "an older one", "all"
STOP_AT = (TRAINING, f"train {DOMAINS[1]}", 15)
TARGETS = (NEWEST, NEWEST_TWO, ALL, NEWEST, OLDER, NEWEST)
PROBLEM = "not whole"
"""What a warning about a damaged checkpoint says of it."""
MOST_SECONDS = 150.0
POLL = 0.001


@dataclass(frozen=True)
class Verdict:
    """What became of a run with damaged checkpoints."""

    damaged: str
    damage: str
    exit_codes: str
    resumed_at: str
    verdict: str
    is_good: bool


def stop_run(undisturbed: Undisturbed) -> Path:
    """A run that was asked to stop while it learned its second domain; returns its folder.

    Raises:
        RuntimeError: it did not stop as it should.
    """
    folder = undisturbed.folder / "stopped"
    folder.mkdir()
    run, trail, log = folder / "run", folder / "trail", folder / "log"
    job, marks = undisturbed.start(run, log, trail), Trail(trail)
    while job.is_running and ((mark := marks.last()) is None or mark.spot != STOP_AT):
        time.sleep(POLL)
    (run / "STOP").touch()
    codes = job.wait(MOST_SECONDS)
    if codes != [EXIT_STOPPED] * NUM_RANKS:
        raise RuntimeError(f"exit codes {codes} after STOP, expected {EXIT_STOPPED}; see {log}")
    return run


class CorruptedRuns:
    """Copies of a stopped run, each damaged in its own way and then continued.

    Args:
        undisturbed: what to run, and what it has to come to.
        stopped: folder of the stopped run.
    """

    def __init__(self, undisturbed: Undisturbed, stopped: Path) -> None:
        self._undisturbed, self._stopped = undisturbed, stopped

    def damage_and_continue(self, number: int, generator: Random) -> Verdict:
        """One copy; the kind of damage and its target follow from the number."""
        folder = self._undisturbed.folder / f"corrupted_{number:02d}"
        run, log, trail = folder / "run", folder / "log", folder / "trail"
        shutil.copytree(self._stopped, run)
        target, corrupt = TARGETS[number % len(TARGETS)], CORRUPTIONS[number % len(CORRUPTIONS)]
        damage = {path.name: corrupt(path, generator) for path in _targets(run, target, generator)}
        try:
            codes = self._undisturbed.start(run, log, trail).wait(MOST_SECONDS)
        except TimeoutError:
            return Verdict(target, next(iter(damage.values())), "-", "-", "did not end", False)
        # Of checkpoints older than a sound one nothing is read, and nothing needs to be said.
        is_named = all(any(name in line and PROBLEM in line for line in _lines(log)) for name in damage)
        resumed = first_batch(Trail(trail).marks())
        verdict, is_good = self._judge(run, target, codes, is_named, resumed)
        return Verdict(
            damaged=target,
            damage=next(iter(damage.values())),
            exit_codes=" and ".join(map(str, codes)),
            resumed_at=f"{resumed.part} {resumed.step}" if resumed else "-",
            verdict=verdict,
            is_good=is_good,
        )

    def _judge(
        self, run: Path, target: str, codes: list[int], is_named: bool, resumed: Mark | None
    ) -> tuple[str, bool]:
        if codes == [EXIT_USER_ERROR] * NUM_RANKS:
            is_right = target == ALL and is_named
            return ("detected: refused, none is whole" if is_right else "refused without need or reason"), is_right
        if any(codes):
            return "crashed", False
        if found := differences(self._undisturbed.outcome, outcome(run)):
            return f"finished with {len(found)} differences such as {found[0]}", False
        if self._undisturbed.track.is_first(resumed):
            return "started from scratch without a word", False
        if is_named:
            return "detected: named, one before it used", True
        if target != OLDER:
            return "not noticed", False
        return "harmless: not read, equal to the undisturbed run", True


def _targets(run: Path, target: str, generator: Random) -> list[Path]:
    checkpoints = checkpoints_of(run)
    chosen = {ALL: checkpoints, NEWEST: checkpoints[-1:], NEWEST_TWO: checkpoints[-2:]}
    return chosen[target] if target in chosen else [generator.choice(checkpoints[:-1])]


def _lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines()
