"""Chaos test: kills a small job at random moments, corrupts its checkpoints, and compares it with a reference run.

A run that is killed with SIGKILL and restarted by the same command until it finishes has to end with bitwise the same
models, importance, results and metrics as a run that is not interrupted; a corrupt checkpoint has to be detected.

Run: `python -m benchmarks.chaos [--runs 32] [--corruptions 20] [--seed 0]`
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from benchmarks.chaos.corrupted_run import CorruptedRuns, stop_run
from benchmarks.chaos.job import job_settings, write_job
from benchmarks.chaos.killed_run import KilledRun
from benchmarks.chaos.reference_run import ReferenceRun, run_reference
from benchmarks.chaos.report import Report
from benchmarks.chaos.schedule import PLACES, build_schedule, draw_goal

MAX_EXTRA_RUNS = 10


def main() -> int:
    """Run everything, print and write the tables; 1 where any run differs, hangs or crashes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=32, help="runs that are killed")
    parser.add_argument("--corruptions", type=int, default=20, help="runs with damaged checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of places, moments, victims and damage")
    parser.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), default=2)
    parser.add_argument("--granularity", choices=("unit", "parameter"), default="unit", help="of importance")
    parser.add_argument("--folder", type=Path, help="new folder that keeps all runs; default: a temporary one")
    options = vars(parser.parse_args())
    if (folder := options.pop("folder")) is not None:
        folder.mkdir(parents=True)
        return measure(folder.resolve(), **options)
    with TemporaryDirectory() as temporary:
        return measure(Path(temporary), **options)


def measure(folder: Path, *, runs: int, corruptions: int, seed: int, zero_stage: int, granularity: str) -> int:
    """See `main`."""
    began = time.monotonic()
    settings = job_settings(zero_stage, granularity)
    reference = run_reference(write_job(folder, settings), folder)
    report = Report({"seed": seed, **settings}, reference)
    kill_runs(reference, report, runs, seed)
    if corruptions:
        corrupted = CorruptedRuns(reference, stop_run(reference))
        generator = Random(seed)
        for number in range(corruptions):
            report.add_verdict(corrupted.corrupt_and_resume(number, generator))
    report.minutes = (time.monotonic() - began) / 60
    report.print()
    print(f"written to {report.write()}")
    return 0 if report.is_good else 1


def kill_runs(reference: ReferenceRun, report: Report, num_runs: int, seed: int) -> None:
    """The scheduled runs, and more for places that none of their kills hit."""
    timeline = reference.timeline
    goals = build_schedule(timeline, num_runs, seed)
    generator = Random(seed)
    for number in range(num_runs + MAX_EXTRA_RUNS):
        if number >= num_runs:
            if not report.missed_places:
                break
            goals.append([draw_goal(report.missed_places[0], timeline, generator)])
        run = KilledRun(number, reference)
        run.execute(goals[number])
        report.add_run(run)
    report.failures += [f"never killed: {place}" for place in report.missed_places if num_runs >= len(PLACES)]


if __name__ == "__main__":
    sys.exit(main())
