"""The course of the undisturbed run: every place in order and how long it took, to aim at and to count what is lost."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

from benchmarks.chaos.trail import BETWEEN, START, TRAINING, Mark, Spot


def unfinished_checkpoints(run_folder: Path) -> list[Path]:
    """Checkpoints that are being written, or whose writer was killed."""
    return list((run_folder / "checkpoints").glob(".partial-*"))


def checkpoints_of(run_folder: Path) -> list[Path]:
    """Visible checkpoints, the newest last."""
    return sorted((run_folder / "checkpoints").glob("[0-9]*_*"))


@dataclass(frozen=True)
class Track:
    """Marks of the undisturbed run."""

    marks: list[Mark]
    save_seconds: float
    """Average time for which a checkpoint was unfinished."""

    def __post_init__(self) -> None:
        spots = [mark.spot for mark in self.marks]
        assert len(set(spots)) == len(spots), "a batch or step is named by its place, part and number"

    @property
    def start_seconds(self) -> float:
        """From the first line of the program to the first batch."""
        return self.marks[1].seconds - self.marks[0].seconds

    def position(self, spot: Spot | None) -> int:
        """How far along the run a spot lies; -1 where it does not occur."""
        return next((index for index, mark in enumerate(self.marks) if mark.spot == spot), -1)

    def is_first(self, mark: Mark | None) -> bool:
        """Whether the run began here."""
        return mark is not None and self.position(mark.spot) == 1

    def seconds_at(self, spot: Spot) -> float:
        """How long the run stayed there."""
        here = self.position(spot)
        return self.marks[here + 1].seconds - self.marks[here].seconds if here + 1 < len(self.marks) else 0.0

    def random_spot(self, places: tuple[str, ...], generator: Random) -> Spot:
        """A spot of one of these places, each as likely as it takes long."""
        pairs = [(mark, after.seconds - mark.seconds) for mark, after in pairwise(self.marks) if mark.place in places]
        assert pairs, f"the undisturbed run never came to {places}"
        mark = generator.choices([mark for mark, _ in pairs], weights=[seconds for _, seconds in pairs])[0]
        return mark.spot

    def lost(self, died_at: Spot, resumed_at: Spot) -> tuple[int, int]:
        """Optimizer steps and other batches that are done again, those that were not finished included."""
        again = self.marks[max(self.position(resumed_at), 0) : self.position(died_at) + 1]
        steps = sum(mark.place == TRAINING for mark in again)
        return steps, sum(mark.is_batch for mark in again) - steps


def first_batch(marks: list[Mark]) -> Mark | None:
    """Where a start took up the work."""
    return next((mark for mark in marks if mark.place not in (START, BETWEEN)), None)
