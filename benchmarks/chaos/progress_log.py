"""Progress log: rank 0 of a job records its progress in a file, whose last line shows where the job was killed."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from das_ds.config.stage import Stage
from das_ds.distributed.resumable import ResumableLoop
from das_ds.training import model_exports, trainer
from das_ds.training.data_module import DataModule

Spot = tuple[str, str, int]
"""Place, part and number of a batch or optimizer step: the same in every run of a job."""

START = "start"
EVALUATION = "evaluation"
TRAINING = "training"
BETWEEN = "between phases"
EXPORT = "export"
GENERAL = "importance of general knowledge"
DOMAIN = "importance of a domain"
MAX_LINE_LENGTH = 256


@dataclass(frozen=True)
class Mark:
    """One line: when rank 0 reached which batch or optimizer step of which part of the run."""

    seconds: float
    place: str
    part: str
    """Name of the part, unique within the run, such as `evaluate food, 1 learned`."""
    step: int

    @property
    def spot(self) -> Spot:
        """The mark without its time."""
        return self.place, self.part, self.step

    @property
    def is_batch(self) -> bool:
        """Whether a batch or an optimizer step begins here."""
        return self.place in (EVALUATION, TRAINING, GENERAL, DOMAIN)


class ProgressLog:
    """Appends marks to a file, or reads them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self.num_learned = 0
        """Domains learned, to distinguish the evaluations of a run."""

    def add(self, place: str, part: str, step: int = 0) -> None:
        """Append a mark, in one short write that a kill cannot split."""
        os.write(self._descriptor, f"{time.monotonic():.4f}\t{place}\t{part}\t{step}\n".encode())

    def last(self) -> Mark | None:
        """The newest mark."""
        size = os.fstat(self._descriptor).st_size
        tail = os.pread(self._descriptor, MAX_LINE_LENGTH, max(size - MAX_LINE_LENGTH, 0)).decode()
        # A line that is being written may be incomplete.
        lines = tail[: tail.rfind("\n") + 1].splitlines()
        return _mark(lines[-1]) if lines else None

    def marks(self) -> list[Mark]:
        """All marks."""
        return [_mark(line) for line in self._path.read_text(encoding="utf-8").splitlines()]

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def follow(progress_log: ProgressLog) -> None:
    """Record a mark for every batch, optimizer step and export of this process, which is rank 0."""
    progress_log.add(START, "start")
    _follow_evaluation(progress_log)
    _follow_loops(progress_log)
    _follow_training(progress_log)
    export = model_exports.export_model

    def followed(folder: Path, *args: Any, **kwargs: Any) -> None:
        progress_log.add(EXPORT, f"export {folder.parent.name}")
        export(folder, *args, **kwargs)
        progress_log.add(BETWEEN, f"after export {folder.parent.name}")

    model_exports.export_model = followed


def _follow_evaluation(progress_log: ProgressLog) -> None:
    evaluate = trainer.ContinualTrainer._evaluate

    def followed(self: trainer.ContinualTrainer) -> None:
        progress_log.num_learned = self._state.domains_done
        evaluate(self)

    trainer.ContinualTrainer._evaluate = followed  # type: ignore[method-assign]


def _follow_loops(progress_log: ProgressLog) -> None:
    batches = ResumableLoop.__iter__

    def followed(self: ResumableLoop[Any]) -> Iterator[Any]:
        place = _loop_place(self._label)
        part = f"{self._label}, {progress_log.num_learned} learned" if place == EVALUATION else self._label
        for batch in batches(self):
            progress_log.add(place, part, self.num_done)
            yield batch
        progress_log.add(BETWEEN, f"after {part}")

    ResumableLoop.__iter__ = followed  # type: ignore[method-assign]


def _loop_place(label: str) -> str:
    if label.startswith("evaluate"):
        return EVALUATION
    return GENERAL if "general knowledge" in label else DOMAIN


def _follow_training(progress_log: ProgressLog) -> None:
    steps = DataModule.training_steps

    def followed(self: DataModule, stage: Stage, first_step: int = 0) -> Generator[Any]:
        for step, batches in enumerate(steps(self, stage, first_step), start=first_step):
            progress_log.add(TRAINING, f"train {stage.name}", step)
            yield batches
        progress_log.add(BETWEEN, f"after train {stage.name}")

    DataModule.training_steps = followed  # type: ignore[method-assign]


def _mark(line: str) -> Mark:
    seconds, place, part, step = line.split("\t")
    return Mark(float(seconds), place, part, int(step))
