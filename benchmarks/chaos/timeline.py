"""Timeline of the reference run: its marks and their durations, to aim kills and to count repeated work."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

from benchmarks.chaos.progress_log import BETWEEN, START, TRAINING, Mark, Spot


def unfinished_checkpoints(run_folder: Path) -> list[Path]:
    """Staging folders of checkpoints that are being written, or whose writer was killed."""
    return list((run_folder / "checkpoints").glob(".partial-*"))


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Published checkpoints, the newest last."""
    return sorted((run_folder / "checkpoints").glob("[0-9]*_*"))


@dataclass(frozen=True)
class Timeline:
    """Marks of the reference run."""

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
        """Index of a spot in the run; -1 if it does not occur."""
        return next((index for index, mark in enumerate(self.marks) if mark.spot == spot), -1)

    def is_first(self, mark: Mark | None) -> bool:
        """Whether the run began here."""
        return mark is not None and self.position(mark.spot) == 1

    def seconds_at(self, spot: Spot) -> float:
        """How long the run stayed at a spot."""
        here = self.position(spot)
        return self.marks[here + 1].seconds - self.marks[here].seconds if here + 1 < len(self.marks) else 0.0

    def random_spot(self, places: tuple[str, ...], generator: Random) -> Spot:
        """A spot of one of these places, with probability proportional to its duration."""
        pairs = [(mark, after.seconds - mark.seconds) for mark, after in pairwise(self.marks) if mark.place in places]
        assert pairs, f"the reference run never reached {places}"
        mark = generator.choices([mark for mark, _ in pairs], weights=[seconds for _, seconds in pairs])[0]
        return mark.spot

    def count_repeated(self, died_at: Spot, resumed_at: Spot) -> tuple[int, int]:
        """(optimizer steps, other batches) that are repeated after a kill, including the unfinished one."""
        repeated = self.marks[max(self.position(resumed_at), 0) : self.position(died_at) + 1]
        steps = sum(mark.place == TRAINING for mark in repeated)
        return steps, sum(mark.is_batch for mark in repeated) - steps


def first_batch(marks: list[Mark]) -> Mark | None:
    """The first batch or step of a start."""
    return next((mark for mark in marks if mark.place not in (START, BETWEEN)), None)
