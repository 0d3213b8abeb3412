"""Killed run: killed at chosen moments, restarted by the same command, and finished."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from benchmarks.chaos.job_processes import Job
from benchmarks.chaos.progress_log import START, Mark, ProgressLog
from benchmarks.chaos.reference_run import ReferenceRun
from benchmarks.chaos.run_digest import differences, run_digest
from benchmarks.chaos.schedule import SAVING, Goal
from benchmarks.chaos.timeline import first_batch, list_checkpoints, unfinished_checkpoints

MAX_SECONDS = 150.0
POLL = 0.0005


@dataclass(frozen=True)
class Death:
    """A kill and its cost."""

    run: int
    place: str
    part: str
    step: int
    saving: bool
    """Whether a checkpoint was being written."""
    ranks: str
    newest_checkpoint: str
    resumed_at: str
    steps_lost: int
    batches_lost: int
    seconds_to_end: float
    """Until the ranks that were not killed had exited too."""


class KilledRun:
    """One run folder with all its starts.

    Args:
        number: of the run, for the table.
        reference: the command to run, and the expected result.
    """

    def __init__(self, number: int, reference: ReferenceRun) -> None:
        self.number = number
        self._reference = reference
        self._timeline = reference.timeline
        self._folder = reference.folder / f"run_{number:02d}"
        self._folder.mkdir()
        self._run_folder = self._folder / "run"
        self._num_starts = 0
        self._died_at = reference.timeline.marks[0].spot
        self.deaths: list[Death] = []
        self.failures: list[str] = []

    def execute(self, goals: list[Goal]) -> None:
        """Kill at each goal that is reached, then let the run finish and compare it with the reference run."""
        for goal in goals:
            self._start_and_kill(goal)
        if not self.failures:
            self._finish()

    def _finish(self) -> None:
        job, progress_log = self._start()
        try:
            codes = job.wait(MAX_SECONDS)
        except TimeoutError as error:
            self.failures.append(f"a start without a kill: {error}")
            return
        self._note_resumed(progress_log.marks())
        if any(codes):
            self.failures.append(f"a start without a kill: exit codes {codes}")
        else:
            self.failures += differences(self._reference.digest, run_digest(self._run_folder))

    def _start(self) -> tuple[Job, ProgressLog]:
        self._num_starts += 1
        progress_path = self._folder / f"progress_{self._num_starts}"
        log = self._folder / f"log_{self._num_starts}"
        return self._reference.start(self._run_folder, log, progress_path), ProgressLog(progress_path)

    def _start_and_kill(self, goal: Goal) -> None:
        job, progress_log = self._start()
        is_reached = self._wait_for(goal, job, progress_log)
        if is_reached:
            job.kill(goal.ranks)
        began = time.monotonic()
        is_saving = bool(unfinished_checkpoints(self._run_folder))
        mark = progress_log.last()
        try:
            codes = job.wait(MAX_SECONDS)
        except TimeoutError as error:
            self.failures.append(f"after a kill of {goal.ranks} at {goal.spot}: {error}")
            return
        self._note_resumed(progress_log.marks())
        if is_reached:
            self._note_death(goal, mark, is_saving, time.monotonic() - began)
        elif any(codes):
            self.failures.append(f"exit codes {codes} without a kill")

    def _wait_for(self, goal: Goal, job: Job, progress_log: ProgressLog) -> bool:
        """Wait for the moment of a goal; whether it came while the job was running."""
        if goal.spot is None:
            time.sleep(goal.fraction * self._timeline.start_seconds)
            return job.is_running
        target = self._timeline.position(goal.spot)
        seconds = self._timeline.seconds_at(goal.spot)
        # The run may resume beyond the target, from a checkpoint after an earlier kill.
        while (
            (mark := progress_log.last()) is None or mark.place == START or self._timeline.position(mark.spot) < target
        ):
            if not _still_running(job):
                return False
        if goal.place == SAVING:
            seconds = self._timeline.save_seconds
            while not unfinished_checkpoints(self._run_folder):
                if not _still_running(job):
                    return False
        time.sleep(goal.fraction * seconds)
        return job.is_running

    def _note_death(self, goal: Goal, mark: Mark | None, is_saving: bool, seconds: float) -> None:
        at = mark or Mark(0.0, START, "start", 0)
        # A checkpoint that an earlier kill left unfinished still exists while the job starts.
        is_saving = is_saving and at.place != START
        death = Death(
            run=self.number,
            place=at.place,
            part=at.part,
            step=at.step,
            saving=is_saving,
            ranks=" and ".join(map(str, goal.ranks)),
            newest_checkpoint=max((path.name for path in list_checkpoints(self._run_folder)), default="-"),
            resumed_at="-",
            steps_lost=0,
            batches_lost=0,
            seconds_to_end=round(seconds, 1),
        )
        self.deaths.append(death)
        self._died_at = at.spot

    def _note_resumed(self, marks: list[Mark]) -> None:
        """Complete the row of the last kill with the point at which this start resumed."""
        resumed = first_batch(marks)
        if not self.deaths or self.deaths[-1].resumed_at != "-" or resumed is None:
            return
        steps, batches = self._timeline.count_repeated(self._died_at, resumed.spot)
        self.deaths[-1] = replace(
            self.deaths[-1], resumed_at=f"{resumed.part} {resumed.step}", steps_lost=steps, batches_lost=batches
        )


def _still_running(job: Job) -> bool:
    time.sleep(POLL)
    return job.is_running
