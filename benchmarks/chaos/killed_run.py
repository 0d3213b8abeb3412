"""A run that is killed at chosen moments, started again by the same command, and finished."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from benchmarks.chaos.job_processes import Job
from benchmarks.chaos.outcome import differences, outcome
from benchmarks.chaos.plan import SAVING, Goal
from benchmarks.chaos.track import checkpoints_of, first_batch, unfinished_checkpoints
from benchmarks.chaos.trail import START, Mark, Trail
from benchmarks.chaos.undisturbed import Undisturbed

MOST_SECONDS = 150.0
POLL = 0.0005


@dataclass(frozen=True)
class Death:
    """A kill and what it cost."""

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
    """Until the ranks that were not killed had ended too."""


class KilledRun:
    """One run folder with all its starts.

    Args:
        number: of the run, for the table.
        undisturbed: what to run, and what it has to come to.
    """

    def __init__(self, number: int, undisturbed: Undisturbed) -> None:
        self.number, self._undisturbed, self._track = number, undisturbed, undisturbed.track
        self._folder = undisturbed.folder / f"run_{number:02d}"
        self._folder.mkdir()
        self._run_folder = self._folder / "run"
        self._num_starts, self._died_at = 0, undisturbed.track.marks[0].spot
        self.deaths: list[Death] = []
        self.failures: list[str] = []

    def go(self, goals: list[Goal]) -> None:
        """Kill at each goal that is reached, then let the run finish and compare it with the undisturbed one."""
        for goal in goals:
            self._start_and_kill(goal)
        if not self.failures:
            self._finish()

    def _finish(self) -> None:
        job, trail = self._start()
        try:
            codes = job.wait(MOST_SECONDS)
        except TimeoutError as error:
            self.failures.append(f"a start that was left alone: {error}")
            return
        self._note_resumed(trail.marks())
        if any(codes):
            self.failures.append(f"a start that was left alone: exit codes {codes}")
        else:
            self.failures += differences(self._undisturbed.outcome, outcome(self._run_folder))

    def _start(self) -> tuple[Job, Trail]:
        self._num_starts += 1
        trail = self._folder / f"trail_{self._num_starts}"
        log = self._folder / f"log_{self._num_starts}"
        return self._undisturbed.start(self._run_folder, log, trail), Trail(trail)

    def _start_and_kill(self, goal: Goal) -> None:
        job, trail = self._start()
        is_reached = self._wait_for(goal, job, trail)
        if is_reached:
            job.kill(goal.ranks)
        began, is_saving, mark = time.monotonic(), bool(unfinished_checkpoints(self._run_folder)), trail.last()
        try:
            codes = job.wait(MOST_SECONDS)
        except TimeoutError as error:
            self.failures.append(f"after a kill of {goal.ranks} at {goal.spot}: {error}")
            return
        self._note_resumed(trail.marks())
        if is_reached:
            self._note_death(goal, mark, is_saving, time.monotonic() - began)
        elif any(codes):
            self.failures.append(f"exit codes {codes} without a kill")

    def _wait_for(self, goal: Goal, job: Job, trail: Trail) -> bool:
        """Whether the moment came while the job was running."""
        if goal.spot is None:
            time.sleep(goal.fraction * self._track.start_seconds)
            return job.is_running
        wanted, seconds = self._track.position(goal.spot), self._track.seconds_at(goal.spot)
        # A position beyond: the checkpoint is of a later time, as after an earlier kill of the same run.
        while (mark := trail.last()) is None or mark.place == START or self._track.position(mark.spot) < wanted:
            if not _still_running(job):
                return False
        if goal.place == SAVING:
            seconds = self._track.save_seconds
            while not unfinished_checkpoints(self._run_folder):
                if not _still_running(job):
                    return False
        time.sleep(goal.fraction * seconds)
        return job.is_running

    def _note_death(self, goal: Goal, mark: Mark | None, is_saving: bool, seconds: float) -> None:
        at = mark or Mark(0.0, START, "start", 0)
        # What an earlier kill left unfinished is still there while the job starts.
        is_saving = is_saving and at.place != START
        death = Death(
            run=self.number,
            place=at.place,
            part=at.part,
            step=at.step,
            saving=is_saving,
            ranks=" and ".join(map(str, goal.ranks)),
            newest_checkpoint=max((path.name for path in checkpoints_of(self._run_folder)), default="-"),
            resumed_at="-",
            steps_lost=0,
            batches_lost=0,
            seconds_to_end=round(seconds, 1),
        )
        self.deaths.append(death)
        self._died_at = at.spot

    def _note_resumed(self, marks: list[Mark]) -> None:
        """Complete the row of the last kill by where this start took up the work."""
        resumed = first_batch(marks)
        if not self.deaths or self.deaths[-1].resumed_at != "-" or resumed is None:
            return
        steps, batches = self._track.lost(self._died_at, resumed.spot)
        self.deaths[-1] = replace(
            self.deaths[-1], resumed_at=f"{resumed.part} {resumed.step}", steps_lost=steps, batches_lost=batches
        )


def _still_running(job: Job) -> bool:
    time.sleep(POLL)
    return job.is_running
