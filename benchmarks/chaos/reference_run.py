"""Reference run: not interrupted; all other runs are compared with it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos.job_processes import Job
from benchmarks.chaos.progress_log import ProgressLog
from benchmarks.chaos.run_digest import differences, run_digest
from benchmarks.chaos.timeline import Timeline, unfinished_checkpoints

POLL = 0.001


@dataclass(frozen=True)
class ReferenceRun:
    """The command, the folder for its runs, and the expected digest of a run."""

    config: Path
    folder: Path
    timeline: Timeline
    digest: dict[str, str]

    def start(self, output_dir: Path, log: Path, progress_path: Path) -> Job:
        """The same command over another output folder."""
        return _start(self.config, output_dir, log, progress_path)


def run_reference(config: Path, folder: Path) -> ReferenceRun:
    """Run the job twice.

    Raises:
        RuntimeError: it did not finish, or the two runs differ.
    """
    timeline, first = _run(config, folder / "reference")
    _, second = _run(config, folder / "reference_again")
    if names := differences(first, second):
        raise RuntimeError(f"two reference runs differ, so that a comparison would show nothing: {names[:5]}")
    return ReferenceRun(config, folder, timeline, first)


def _start(config: Path, output_dir: Path, log: Path, progress_path: Path) -> Job:
    return Job(["train", "--config", str(config), f"output_dir={output_dir}"], log, progress_path)


def _run(config: Path, folder: Path) -> tuple[Timeline, dict[str, str]]:
    folder.mkdir()
    run = folder / "run"
    log = folder / "log"
    progress_path = folder / "progress"
    unfinished = 0.0
    seen = set[str]()
    job = _start(config, run, log, progress_path)
    now = time.monotonic()
    while job.is_running:
        before = now
        now = time.monotonic()
        if paths := unfinished_checkpoints(run):
            unfinished += now - before
            seen |= {path.name for path in paths}
        time.sleep(POLL)
    if any(codes := job.wait(1.0)):
        raise RuntimeError(f"the reference run ended with exit codes {codes}; see {log}")
    return Timeline(ProgressLog(progress_path).marks(), unfinished / max(len(seen), 1)), run_digest(run)
