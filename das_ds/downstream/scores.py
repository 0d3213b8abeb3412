"""end_tasks.json: what a model scores on end tasks, seed by seed, typed and versioned; it grows as seeds are done."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from das_ds.config import TaskConfig
from das_ds.downstream.tasks import EndTask
from das_ds.errors import RunFolderError
from das_ds.storage import Section, VersionedJson
from das_ds.versions import library_versions

FORMAT_VERSION: Literal[2] = 2
NOT_SETTINGS = {"name", "domain", "train", "dev", "test", "seeds"}
"""Keys of a task that may change between two starts: a file counts by its content, and seeds may be added."""

MetricName = Literal["accuracy", "macro_f1", "micro_f1"]


class Scores(Section):
    """Scores on one file; see `downstream.metrics`."""

    accuracy: float
    macro_f1: float
    micro_f1: float

    def of(self, metric: MetricName) -> float:
        """The score of this name."""
        return float(getattr(self, metric))


class SeedScores(Section):
    """One training of one task."""

    seed: int
    epochs: int
    """Epochs trained."""
    best_epoch: int
    """The epoch with the best dev score, whose weights are scored."""
    dev: Scores
    test: Scores


class SeedStatistics(Section):
    """The reported metric over all seeds."""

    mean: float
    deviation: float | None
    """Standard deviation of a sample; null for one seed."""


class TaskScores(Section):
    """One task: its seeds, and what they give together."""

    domain: str | None
    """The domain whose end task it is, as the config says it."""
    metric: MetricName
    """The reported one."""
    labels: list[str]
    """Classes in the order of their numbers."""
    settings: dict[str, Any]
    """What decides the scores besides model and seed: keys of the task, and the identities of its files."""
    seeds: list[SeedScores] = Field(min_length=1)
    """Sorted by seed."""
    dev: SeedStatistics
    test: SeedStatistics


class EndTaskScores(VersionedJson):
    """Scores of one model."""

    what: ClassVar[str] = "scores of end tasks"
    format_version: Literal[2] = FORMAT_VERSION
    """Version of this format."""
    model: str
    """Checksum of the model's weights."""
    tasks: dict[str, TaskScores] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=library_versions)
    """Versions of the libraries at the first start."""

    def has(self, task: str, seed: int) -> bool:
        """Whether this job is done."""
        return task in self.tasks and seed in [found.seed for found in self.tasks[task].seeds]

    def with_seed(self, task: EndTask, scores: SeedScores) -> EndTaskScores:
        """A copy with one more job done."""
        name, metric = task.config.name, task.config.metric
        known = self.tasks[name].seeds if name in self.tasks else []
        seeds = sorted([*known, scores], key=lambda done: done.seed)
        entry = TaskScores(
            domain=task.config.domain,
            metric=metric,
            labels=task.labels,
            settings=task_settings(task),
            seeds=seeds,
            dev=_spread([done.dev.of(metric) for done in seeds]),
            test=_spread([done.test.of(metric) for done in seeds]),
        )
        return self.model_copy(update={"tasks": {**self.tasks, name: entry}})

    def with_domains(self, tasks: list[EndTask]) -> EndTaskScores:
        """A copy in which what is known of these tasks belongs to the domains that they name."""
        named = {task.config.name: task.config.domain for task in tasks if task.config.name in self.tasks}
        entries = {name: self.tasks[name].model_copy(update={"domain": domain}) for name, domain in named.items()}
        return self.model_copy(update={"tasks": {**self.tasks, **entries}})


def task_settings(task: EndTask) -> dict[str, Any]:
    """What decides a task's scores besides model and seed."""
    return {**task.config.model_dump(mode="json", exclude=NOT_SETTINGS), "files": task.fingerprints}


def open_scores(path: Path, model: str, tasks: list[EndTask]) -> EndTaskScores:
    """The scores that a file holds, or none yet where there is no file.

    Raises:
        RunFolderError: the file has no folder, is damaged, of another model, or has a task with other settings.
    """
    if not path.exists():
        if not path.parent.is_dir():
            raise RunFolderError(f"{path}: found no folder {path.parent}, expected one to write scores to")
        return EndTaskScores(model=model)
    scores = EndTaskScores.read(path)
    if scores.model != model:
        raise RunFolderError(f"{path}: holds scores of other weights than the model has; move the file away")
    for task in tasks:
        name, settings = task.config.name, task_settings(task)
        known = scores.tasks[name].settings if name in scores.tasks else settings
        if known != settings:
            changes = [
                f"{key}: was {known.get(key)}, now {settings.get(key)}"
                for key in dict.fromkeys([*known, *settings])
                if known.get(key) != settings.get(key)
            ]
            raise RunFolderError(
                f"{path}: task {name} was done with other settings ({'; '.join(changes)}); use the same, another name "
                "for the task, or move the file away"
            )
    return scores


def summarize_scores(scores: EndTaskScores, tasks: list[TaskConfig]) -> dict[str, dict[str, Any]]:
    """Task -> reported metric, number of seeds, and its spread on dev and test."""
    found = {task.name: scores.tasks[task.name] for task in tasks}
    return {
        name: {
            "metric": entry.metric,
            "seeds": len(entry.seeds),
            "dev": entry.dev.model_dump(),
            "test": entry.test.model_dump(),
        }
        for name, entry in found.items()
    }


def mean_scores(scores: EndTaskScores) -> dict[str, float]:
    """`end_task/<task>/<part>` -> mean of the reported metric, for a tracker's `log_summary`."""
    return {
        f"end_task/{name}/{part}": spread.mean
        for name, entry in scores.tasks.items()
        for part, spread in (("dev", entry.dev), ("test", entry.test))
    }


def build_score_table(scores: EndTaskScores) -> tuple[list[str], list[list[float | int | str]]]:
    """Column names and a row per seed, for a tracker's `log_table`."""
    rows: list[list[float | int | str]] = [
        [name, done.seed, entry.metric, done.dev.of(entry.metric), done.test.of(entry.metric), done.best_epoch]
        for name, entry in scores.tasks.items()
        for done in entry.seeds
    ]
    return ["task", "seed", "metric", "dev", "test", "best_epoch"], rows


def _spread(values: list[float]) -> SeedStatistics:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return SeedStatistics(mean=statistics.fmean(values), deviation=deviation)
