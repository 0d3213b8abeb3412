"""Starts jobs as processes, some at a time and up to a deadline, and keeps a manifest of what was started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from benchmarks.domains.jobs import ROOT, Job
from das_ds.errors import EXIT_STOPPED, StoppedError, TrainingError

POLL = 0.2
WORTH_STARTING = 60.0
"""Seconds before the deadline within which no job is started: most of them would go by with imports."""
PATIENCE = 120.0
"""Seconds that a run has to save and end."""
MANIFEST = "manifest.jsonl"


class Runner:
    """Runs jobs that are not done; what is broken off continues with the next call.

    Args:
        folder: of the manifest.
        threads: of each job.
        parallel: jobs at a time.
        minutes: after which everything is asked to stop; None: never.
    """

    def __init__(self, folder: Path, *, threads: int, parallel: int = 1, minutes: float | None = None) -> None:
        self._folder, self._threads, self._parallel = folder, threads, parallel
        self._deadline = float("inf") if minutes is None else time.monotonic() + 60.0 * minutes
        self._is_stopped, self._lock = threading.Event(), threading.Lock()

    def stop_on_signals(self) -> None:
        """SIGTERM and SIGINT let every run save and end."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def run(self, jobs: Sequence[Job]) -> None:
        """Returns when all are done.

        Raises:
            StoppedError: the time is up, or a signal came; the same call continues.
            TrainingError: a job failed.
        """
        left = [job for job in jobs if not job.is_done()]
        for job in jobs:
            if job not in left:
                # Again, where this process was killed before it had tidied up.
                job.finish()
        with ThreadPoolExecutor(self._parallel) as pool:
            futures = [pool.submit(self._do, job) for job in left]
        errors = [error for future in futures if (error := future.exception()) is not None]
        # What failed comes before what was stopped for it.
        for error in sorted(errors, key=lambda error: isinstance(error, StoppedError)):
            raise error

    def _do(self, job: Job) -> None:
        try:
            self._start(job)
        except BaseException:
            # Here, before this thread takes the next job.
            self._is_stopped.set()
            raise

    def _start(self, job: Job) -> None:
        if self._is_stopped.is_set() or time.monotonic() > self._deadline - WORTH_STARTING:
            raise StoppedError("time is up; the same command continues")
        began = time.monotonic()
        code = self._wait(job)
        self._note(job, code, time.monotonic() - began)
        if code == EXIT_STOPPED:
            raise StoppedError(f"{job.name}: stopped and saved; the same command continues")
        if code != 0 or not job.is_done():
            raise TrainingError(f"{job.name}: ended with exit code {code}, expected 0 and results; see {job.log}")
        job.finish()

    def _wait(self, job: Job) -> int:
        command = job.command()
        with job.log.open("ab") as log:
            # Its own session: a Ctrl-C reaches the runs by way of this process, once.
            process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment(), stdout=log, stderr=log, start_new_session=True
            )
            while process.poll() is None:
                if self._is_stopped.is_set() or time.monotonic() > self._deadline:
                    return _stop(process)
                time.sleep(POLL)
        return process.returncode

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return os.environ | {"OMP_NUM_THREADS": str(self._threads), "PYTHONPATH": path}

    def _note(self, job: Job, code: int, seconds: float) -> None:
        line = {
            "job": job.name,
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
            "exit_code": code,
        }
        with self._lock:
            print(f"{job.name}: exit code {code} after {seconds:.0f} s", flush=True)
            with (self._folder / MANIFEST).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _stop(self, _: int, __: FrameType | None) -> None:
        self._is_stopped.set()


def _stop(process: subprocess.Popen[bytes]) -> int:
    """Ask a run to save and end; one that does not is killed and continues from its newest checkpoint."""
    process.terminate()
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return EXIT_STOPPED
