"""What a job is at, written by its rank 0 into a file that outlives it: the last line is where it died."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from das_ds.distributed.resumable import ResumableLoop
from das_ds.training import trainer
from das_ds.training.data_module import DataModule

Spot = tuple[str, str, int]
"""Place, part and number of a batch or optimizer step: the same in every run of a job."""

START, EVALUATION, TRAINING, BETWEEN, EXPORT = "start", "evaluation", "training", "between phases", "export"
GENERAL, DOMAIN = "importance of general knowledge", "importance of a domain"
LONGEST_LINE = 256


@dataclass(frozen=True)
class Mark:
    """One line: when rank 0 came to which batch or optimizer step of which part of the run."""

    seconds: float
    place: str
    part: str
    """What names the part within the run, such as `evaluate food, 1 learned`."""
    step: int

    @property
    def spot(self) -> Spot:
        """Where it is."""
        return self.place, self.part, self.step

    @property
    def is_batch(self) -> bool:
        """Whether a batch or an optimizer step begins here."""
        return self.place in (EVALUATION, TRAINING, GENERAL, DOMAIN)


class Trail:
    """Appends marks to a file, or reads them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self.num_learned = 0
        """Domains learned, which tells the evaluations of a run apart."""

    def add(self, place: str, part: str, step: int = 0) -> None:
        """One short write, which a kill does not divide."""
        os.write(self._descriptor, f"{time.monotonic():.4f}\t{place}\t{part}\t{step}\n".encode())

    def last(self) -> Mark | None:
        """The newest mark."""
        size = os.fstat(self._descriptor).st_size
        tail = os.pread(self._descriptor, LONGEST_LINE, max(size - LONGEST_LINE, 0)).decode()
        # A line that is being added may be seen in part.
        lines = tail[: tail.rfind("\n") + 1].splitlines()
        return _mark(lines[-1]) if lines else None

    def marks(self) -> list[Mark]:
        """All of them."""
        return [_mark(line) for line in self._path.read_text(encoding="utf-8").splitlines()]

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def follow(trail: Trail) -> None:
    """Make this process, which is rank 0, add a mark for every batch, optimizer step and export."""
    trail.add(START, "start")
    _follow_evaluation(trail)
    _follow_passes(trail)
    _follow_training(trail)
    export = trainer.export_model

    def followed(folder: Path, *args: Any, **kwargs: Any) -> None:
        trail.add(EXPORT, f"export {folder.parent.name}")
        export(folder, *args, **kwargs)
        trail.add(BETWEEN, f"after export {folder.parent.name}")

    trainer.export_model = followed


def _follow_evaluation(trail: Trail) -> None:
    evaluate = trainer.ContinualTrainer._evaluate

    def followed(self: trainer.ContinualTrainer) -> None:
        trail.num_learned = self._state.domains_done
        evaluate(self)

    trainer.ContinualTrainer._evaluate = followed  # type: ignore[method-assign]


def _follow_passes(trail: Trail) -> None:
    batches = ResumableLoop.__iter__

    def followed(self: ResumableLoop[Any]) -> Iterator[Any]:
        place = _place_of_pass(self._label)
        part = f"{self._label}, {trail.num_learned} learned" if place == EVALUATION else self._label
        for batch in batches(self):
            trail.add(place, part, self.done)
            yield batch
        trail.add(BETWEEN, f"after {part}")

    ResumableLoop.__iter__ = followed  # type: ignore[method-assign]


def _place_of_pass(label: str) -> str:
    if label.startswith("evaluate"):
        return EVALUATION
    return GENERAL if "general knowledge" in label else DOMAIN


def _follow_training(trail: Trail) -> None:
    steps = DataModule.training_steps

    def followed(self: DataModule, corpus: str, first_step: int = 0) -> Iterator[Any]:
        for step, batches in enumerate(steps(self, corpus, first_step), start=first_step):
            trail.add(TRAINING, f"train {corpus}", step)
            yield batches
        trail.add(BETWEEN, f"after train {corpus}")

    DataModule.training_steps = followed  # type: ignore[method-assign]


def _mark(line: str) -> Mark:
    seconds, place, part, step = line.split("\t")
    return Mark(float(seconds), place, part, int(step))
