"""Kill a small job at random moments and damage its checkpoints: is it ever anything but the undisturbed run?

A run that is killed with SIGKILL and started again by the same command until it finishes has to end with bitwise the
models, importance, results and metrics of the run that nobody disturbed; a damaged checkpoint has to be noticed.

Run: `python -m benchmarks.chaos [--runs 32] [--corruptions 20] [--seed 0]`
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from benchmarks.chaos.corrupted_run import CorruptedRuns, Verdict, stop_run
from benchmarks.chaos.job import DOMAINS, write_job
from benchmarks.chaos.job_processes import Job
from benchmarks.chaos.killed_run import KilledRun
from benchmarks.chaos.outcome import differences, outcome
from benchmarks.chaos.plan import SPOTS, draw_goal, plan
from benchmarks.chaos.report import Report
from benchmarks.chaos.track import Track, unfinished_checkpoints
from benchmarks.chaos.trail import START, TRAINING, Trail

MOST_EXTRA_RUNS = 10


def main() -> int:
    """Run everything, print and write the tables; 1 where any run differs, hangs or crashes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=32, help="runs that are killed")
    parser.add_argument("--corruptions", type=int, default=20, help="runs with damaged checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of places, moments, victims and damage")
    parser.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), default=2)
    parser.add_argument("--granularity", choices=("unit", "parameter"), default="unit", help="of importance")
    parser.add_argument("--folder", type=Path, help="a new folder for all runs, which is kept; default: a temporary one")
    options = parser.parse_args()
    if options.folder is not None:
        options.folder.mkdir(parents=True)
        return _measure(options.folder.resolve(), options)
    with TemporaryDirectory() as folder:
        return _measure(Path(folder), options)


def _measure(folder: Path, options: argparse.Namespace) -> int:
    began = time.monotonic()
    config = write_job(folder, zero_stage=options.zero_stage, granularity=options.granularity)
    arguments = ["train", "--config", str(config)]
    track, expected = undisturbed_run(arguments, folder / "undisturbed")
    _, again = undisturbed_run(arguments, folder / "undisturbed_again")
    if found := differences(expected, again):
        raise RuntimeError(f"two undisturbed runs differ, so that nothing can be shown: {found[:5]}")
    report = Report(vars(options) | {"folder": None}, track, len(expected))
    _kill_runs(arguments, folder, track, expected, options, report)
    _corrupt_runs(arguments, folder, track, expected, options, report)
    report.minutes = (time.monotonic() - began) / 60
    report.print()
    print(f"written to {report.write()}")
    return 0 if report.is_good else 1


def undisturbed_run(arguments: list[str], folder: Path) -> tuple[Track, dict[str, str]]:
    """The course and the outcome of a run that is left alone.

    Raises:
        RuntimeError: it did not finish.
    """
    folder.mkdir()
    run, unfinished, seen = folder / "run", 0.0, set[str]()
    job, now = Job([*arguments, f"output_dir={run}"], folder / "log", folder / "trail"), time.monotonic()
    while job.is_running:
        before, now = now, time.monotonic()
        if found := unfinished_checkpoints(run):
            unfinished += now - before
            seen |= {path.name for path in found}
        time.sleep(0.001)
    if any(codes := job.wait(1.0)):
        raise RuntimeError(f"the undisturbed run ended with exit codes {codes}; see {folder / 'log'}")
    return Track(Trail(folder / "trail").marks(), unfinished / max(len(seen), 1)), outcome(run)


def _kill_runs(
    arguments: list[str],
    folder: Path,
    track: Track,
    expected: dict[str, str],
    options: argparse.Namespace,
    report: Report,
) -> None:
    generator, wanted = Random(options.seed), {*SPOTS, START} - {"any moment"}
    pending = plan(track, options.runs, options.seed)
    for number in range(options.runs + MOST_EXTRA_RUNS):
        if number >= options.runs:
            # A place that luck has spared so far gets runs of its own.
            missed = sorted(wanted - {death.place for death in report.deaths})
            if not missed:
                break
            pending.append([draw_goal(missed[0], track, generator)])
        run = KilledRun(number, arguments, folder, track)
        run.go(pending[number], expected)
        report.add_run(run)


def _corrupt_runs(
    arguments: list[str],
    folder: Path,
    track: Track,
    expected: dict[str, str],
    options: argparse.Namespace,
    report: Report,
) -> None:
    if not options.corruptions:
        return
    spot = next(mark.spot for mark in track.marks if mark.place == TRAINING and mark.part.endswith(DOMAINS[1]) and mark.step == 15)
    stopped = stop_run(arguments, folder / "stopped", spot)
    runs, generator = CorruptedRuns(arguments, stopped, folder, track, expected), Random(options.seed)
    for number in range(options.corruptions):
        verdict: Verdict = runs.damage_and_continue(number, generator)
        report.add_verdict(verdict)


if __name__ == "__main__":
    sys.exit(main())
