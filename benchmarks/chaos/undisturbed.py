"""The run that nobody disturbs, against which all others are held."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos.job_processes import Job
from benchmarks.chaos.outcome import differences, outcome
from benchmarks.chaos.track import Track, unfinished_checkpoints
from benchmarks.chaos.trail import Trail

POLL = 0.001


@dataclass(frozen=True)
class Undisturbed:
    """The command, where its runs may put their folders, and what a run comes to."""

    config: Path
    folder: Path
    track: Track
    outcome: dict[str, str]

    def start(self, output_dir: Path, log: Path, trail: Path) -> Job:
        """The same command over another output folder."""
        return _start(self.config, output_dir, log, trail)


def run_undisturbed(config: Path, folder: Path) -> Undisturbed:
    """Run the job twice.

    Raises:
        RuntimeError: it did not finish, or the two runs differ.
    """
    track, first = _run(config, folder / "undisturbed")
    _, second = _run(config, folder / "undisturbed_again")
    if found := differences(first, second):
        raise RuntimeError(f"two undisturbed runs differ, so that nothing can be shown: {found[:5]}")
    return Undisturbed(config, folder, track, first)


def _start(config: Path, output_dir: Path, log: Path, trail: Path) -> Job:
    return Job(["train", "--config", str(config), f"output_dir={output_dir}"], log, trail)


def _run(config: Path, folder: Path) -> tuple[Track, dict[str, str]]:
    folder.mkdir()
    run, log, trail = folder / "run", folder / "log", folder / "trail"
    unfinished, seen = 0.0, set[str]()
    job, now = _start(config, run, log, trail), time.monotonic()
    while job.is_running:
        before, now = now, time.monotonic()
        if found := unfinished_checkpoints(run):
            unfinished += now - before
            seen |= {path.name for path in found}
        time.sleep(POLL)
    if any(codes := job.wait(1.0)):
        raise RuntimeError(f"the undisturbed run ended with exit codes {codes}; see {log}")
    return Track(Trail(trail).marks(), unfinished / max(len(seen), 1)), outcome(run)
