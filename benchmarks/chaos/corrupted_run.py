"""Corrupted runs: copies of a stopped run whose checkpoints are corrupted before the run resumes."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

from benchmarks.chaos.corruptions import CORRUPTIONS
from benchmarks.chaos.job import DOMAINS
from benchmarks.chaos.job_processes import NUM_RANKS
from benchmarks.chaos.progress_log import TRAINING, Mark, ProgressLog
from benchmarks.chaos.reference_run import ReferenceRun
from benchmarks.chaos.run_digest import differences, run_digest
from benchmarks.chaos.timeline import first_batch, list_checkpoints
from das_ds.errors import EXIT_STOPPED, EXIT_USER_ERROR

NEWEST = "the newest"
NEWEST_TWO = "the newest two"
OLDER = "an older one"
ALL = "all"
STOP_AT = (TRAINING, f"train {DOMAINS[1]}", 15)
TARGETS = (NEWEST, NEWEST_TWO, ALL, NEWEST, OLDER, NEWEST)
PROBLEM = "is corrupt"
"""Part of the warning about a corrupt checkpoint."""
MAX_SECONDS = 150.0
POLL = 0.001


@dataclass(frozen=True)
class Verdict:
    """Outcome of a run with corrupt checkpoints."""

    damaged: str
    damage: str
    exit_codes: str
    resumed_at: str
    verdict: str
    is_good: bool


def stop_run(reference: ReferenceRun) -> Path:
    """Stop a run while it learns its second domain; returns its folder.

    Raises:
        RuntimeError: it did not stop as requested.
    """
    folder = reference.folder / "stopped"
    folder.mkdir()
    run = folder / "run"
    log = folder / "log"
    progress_path = folder / "progress"
    job = reference.start(run, log, progress_path)
    progress_log = ProgressLog(progress_path)
    while job.is_running and ((mark := progress_log.last()) is None or mark.spot != STOP_AT):
        time.sleep(POLL)
    (run / "STOP").touch()
    codes = job.wait(MAX_SECONDS)
    if codes != [EXIT_STOPPED] * NUM_RANKS:
        raise RuntimeError(f"exit codes {codes} after STOP, expected {EXIT_STOPPED}; see {log}")
    return run


class CorruptedRuns:
    """Copies of a stopped run, each corrupted in a different way and then resumed.

    Args:
        reference: the command to run, and the expected result.
        stopped: folder of the stopped run.
    """

    def __init__(self, reference: ReferenceRun, stopped: Path) -> None:
        self._reference = reference
        self._stopped = stopped

    def corrupt_and_resume(self, number: int, generator: Random) -> Verdict:
        """Corrupt and resume one copy; the kind of corruption and its target follow from the number."""
        folder = self._reference.folder / f"corrupted_{number:02d}"
        run = folder / "run"
        log = folder / "log"
        progress_path = folder / "progress"
        shutil.copytree(self._stopped, run)
        target = TARGETS[number % len(TARGETS)]
        corrupt = CORRUPTIONS[number % len(CORRUPTIONS)]
        damage = {path.name: corrupt(path, generator) for path in _targets(run, target, generator)}
        try:
            codes = self._reference.start(run, log, progress_path).wait(MAX_SECONDS)
        except TimeoutError:
            return Verdict(target, next(iter(damage.values())), "-", "-", "did not end", False)
        # Checkpoints older than a valid one are not read, so they need no warning.
        is_named = all(any(name in line and PROBLEM in line for line in _lines(log)) for name in damage)
        resumed = first_batch(ProgressLog(progress_path).marks())
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
            return ("detected: refused, none is valid" if is_right else "refused without a reason"), is_right
        if any(codes):
            return "crashed", False
        if names := differences(self._reference.digest, run_digest(run)):
            return f"finished with {len(names)} differences such as {names[0]}", False
        if self._reference.timeline.is_first(resumed):
            return "silently started from scratch", False
        if is_named:
            return "detected: reported, an earlier one used", True
        if target != OLDER:
            return "not detected", False
        return "harmless: not read, equal to the reference run", True


def _targets(run: Path, target: str, generator: Random) -> list[Path]:
    checkpoints = list_checkpoints(run)
    chosen = {ALL: checkpoints, NEWEST: checkpoints[-1:], NEWEST_TWO: checkpoints[-2:]}
    return chosen[target] if target in chosen else [generator.choice(checkpoints[:-1])]


def _lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines()
