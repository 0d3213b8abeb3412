"""Job runner: starts jobs as processes, several at a time and up to a deadline, and records them in a manifest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from benchmarks.domains.jobs import ROOT, Job
from das_ds.errors import EXIT_STOPPED, StoppedError, TrainingError

POLL_S = 0.2
MIN_TIME_TO_START_S = 60.0
"""No job is started within this time of the deadline: imports alone take most of it."""
STOP_TIMEOUT_S = 120.0
"""Time that a run has to save and exit."""
MANIFEST = "manifest.jsonl"


class Runner:
    """Runs unfinished jobs; the next call resumes what was interrupted.

    Args:
        folder: of the manifest.
        threads: of each job.
        parallel: jobs at a time.
        minutes: time limit, after which all jobs are asked to stop; None: no limit.
    """

    def __init__(self, folder: Path, *, threads: int, parallel: int = 1, minutes: float | None = None) -> None:
        self._folder = folder
        self._threads = threads
        self._parallel = parallel
        self._deadline = float("inf") if minutes is None else time.monotonic() + 60.0 * minutes
        self._is_stopped = threading.Event()
        self._manifest_lock = threading.Lock()

    def stop_on_signals(self) -> None:
        """On SIGTERM and SIGINT, let every run save and exit."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def run_alone(self, job: Job) -> None:
        """Run one job with the threads of all that could run beside it; see `run`."""
        self._run([job], lambda job: None, self._threads * self._parallel)

    def run(self, jobs: Sequence[Job], on_finish: Callable[[Job], None] = lambda job: None) -> None:
        """Run all jobs to completion.

        Args:
            jobs: of which those that are done are left out.
            on_finish: called in this thread as soon as a job has finished.

        Raises:
            StoppedError: time is up, or a signal came; the same call resumes.
            TrainingError: a job failed.
        """
        self._run(jobs, on_finish, self._threads)

    def _run(self, jobs: Sequence[Job], on_finish: Callable[[Job], None], threads: int) -> None:
        pending = [job for job in jobs if not job.is_done()]
        for job in jobs:
            if job not in pending:
                # An earlier process may have been killed before it finished the job.
                job.finish()
        errors = []
        with ThreadPoolExecutor(self._parallel) as pool:
            futures = {pool.submit(self._run_job, job, threads): job for job in pending}
            for future in as_completed(futures):
                if (error := future.exception()) is None:
                    self._call(on_finish, futures[future])
                else:
                    errors.append(error)
        # A failure comes before the jobs that were stopped because of it.
        for error in sorted(errors, key=lambda error: isinstance(error, StoppedError)):
            raise error

    def _call(self, on_finish: Callable[[Job], None], job: Job) -> None:
        try:
            on_finish(job)
        except BaseException:
            # The pool waits for its jobs before this error is seen.
            self._is_stopped.set()
            raise

    def _run_job(self, job: Job, threads: int) -> None:
        try:
            self._start_job(job, threads)
        except BaseException:
            # Set here, before this thread takes the next job.
            self._is_stopped.set()
            raise

    def _start_job(self, job: Job, threads: int) -> None:
        if self._is_stopped.is_set() or time.monotonic() > self._deadline - MIN_TIME_TO_START_S:
            raise StoppedError("time is up; the same command resumes")
        start = time.monotonic()
        code = self._run_process(job, threads)
        self._record(job, code, time.monotonic() - start)
        if code == EXIT_STOPPED:
            raise StoppedError(f"{job.name}: stopped and saved; the same command resumes")
        if code != 0 or not job.is_done():
            raise TrainingError(f"{job.name}: ended with exit code {code}, expected 0 and results; see {job.log}")
        job.finish()

    def _run_process(self, job: Job, threads: int) -> int:
        command = job.command()
        with job.log.open("ab") as log:
            # A separate session, so that Ctrl-C reaches the runs only through this process.
            process = subprocess.Popen(
                command, cwd=ROOT, env=_environment(threads), stdout=log, stderr=log, start_new_session=True
            )
            while process.poll() is None:
                if self._is_stopped.is_set() or time.monotonic() > self._deadline:
                    return _stop(process)
                time.sleep(POLL_S)
        return process.returncode

    def _record(self, job: Job, code: int, seconds: float) -> None:
        line = {
            "job": job.name,
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
            "exit_code": code,
        }
        with self._manifest_lock:
            print(f"{job.name}: exit code {code} after {seconds:.0f} s", flush=True)
            with (self._folder / MANIFEST).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _stop(self, _: int, __: FrameType | None) -> None:
        self._is_stopped.set()


def _environment(threads: int) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}


def _stop(process: subprocess.Popen[bytes]) -> int:
    """Ask a run to save and exit; one that does not is killed and will resume from its newest checkpoint."""
    process.terminate()
    try:
        return process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return EXIT_STOPPED
