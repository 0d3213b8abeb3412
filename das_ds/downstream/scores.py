"""end_tasks.json: the scores of a model on end tasks, typed and versioned; it grows seed by seed."""

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
MUTABLE_KEYS = {"name", "domain", "train", "dev", "test", "seeds"}
"""Keys of a task that may change between starts: files are compared by content, and seeds may be added."""

MetricName = Literal["accuracy", "macro_f1", "micro_f1"]


class Scores(Section):
    """Scores on one file; see `downstream.metrics`."""

    accuracy: float
    macro_f1: float
    micro_f1: float

    def value(self, metric: MetricName) -> float:
        """The score in a metric."""
        return float(getattr(self, metric))


class SeedScores(Section):
    """The scores of one training of a task."""

    seed: int
    epochs: int
    """Epochs trained."""
    best_epoch: int
    """The epoch with the highest dev score; its weights are scored."""
    dev: Scores
    test: Scores


class SeedStatistics(Section):
    """Mean and standard deviation of the reported metric over the seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation; null for one seed."""


class TaskScores(Section):
    """The scores of one task: by seed, and over all seeds."""

    domain: str | None
    """The domain that the task belongs to, from the config."""
    metric: MetricName
    """The reported metric."""
    labels: list[str]
    """Classes in the order of their indices."""
    settings: dict[str, Any]
    """Everything but model and seed that affects the scores: keys of the task, and fingerprints of its files."""
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
        """Whether a task was scored with a seed."""
        return task in self.tasks and seed in [scores.seed for scores in self.tasks[task].seeds]

    def with_seed(self, task: EndTask, scores: SeedScores) -> EndTaskScores:
        """A copy with the scores of one more seed."""
        name = task.config.name
        metric = task.config.metric
        earlier = self.tasks[name].seeds if name in self.tasks else []
        seeds = sorted([*earlier, scores], key=lambda entry: entry.seed)
        task_scores = TaskScores(
            domain=task.config.domain,
            metric=metric,
            labels=task.labels,
            settings=task_settings(task),
            seeds=seeds,
            dev=_summarize([entry.dev.value(metric) for entry in seeds]),
            test=_summarize([entry.test.value(metric) for entry in seeds]),
        )
        return self.model_copy(update={"tasks": {**self.tasks, name: task_scores}})

    def with_domains(self, tasks: list[EndTask]) -> EndTaskScores:
        """A copy in which tasks that were scored belong to the domains that the config now names."""
        named = {task.config.name: task.config.domain for task in tasks if task.config.name in self.tasks}
        entries = {name: self.tasks[name].model_copy(update={"domain": domain}) for name, domain in named.items()}
        return self.model_copy(update={"tasks": {**self.tasks, **entries}})


def task_settings(task: EndTask) -> dict[str, Any]:
    """Everything but model and seed that affects a task's scores."""
    return {**task.config.model_dump(mode="json", exclude=MUTABLE_KEYS), "files": task.fingerprints}


def open_scores(path: Path, model: str, tasks: list[EndTask]) -> EndTaskScores:
    """Read a file of scores; empty scores if the file does not exist.

    Raises:
        RunFolderError: the folder does not exist; or the file is damaged, of another model, or has a task with other
            settings.
    """
    if not path.exists():
        if not path.parent.is_dir():
            raise RunFolderError(f"{path}: found no folder {path.parent}, expected one to write scores to")
        return EndTaskScores(model=model)
    scores = EndTaskScores.read(path)
    if scores.model != model:
        raise RunFolderError(f"{path}: found scores of other weights than the model's; move the file away")
    for task in tasks:
        name = task.config.name
        settings = task_settings(task)
        recorded = scores.tasks[name].settings if name in scores.tasks else settings
        if recorded != settings:
            changes = [
                f"{key}: was {recorded.get(key)}, now {settings.get(key)}"
                for key in dict.fromkeys([*recorded, *settings])
                if recorded.get(key) != settings.get(key)
            ]
            raise RunFolderError(
                f"{path}: task {name} was scored with other settings ({'; '.join(changes)}); use the same, "
                "another name for the task, or move the file away"
            )
    return scores


def summarize_scores(scores: EndTaskScores, tasks: list[TaskConfig]) -> dict[str, dict[str, Any]]:
    """Task -> reported metric, number of seeds, mean and deviation on dev and test."""
    return {
        task.name: {
            "metric": scores.tasks[task.name].metric,
            "seeds": len(scores.tasks[task.name].seeds),
            "dev": scores.tasks[task.name].dev.model_dump(),
            "test": scores.tasks[task.name].test.model_dump(),
        }
        for task in tasks
    }


def mean_scores(scores: EndTaskScores) -> dict[str, float]:
    """`end_task/<task>/<split>` -> mean of the reported metric, for a tracker's `log_summary`."""
    return {
        f"end_task/{name}/{split}": over_seeds.mean
        for name, task in scores.tasks.items()
        for split, over_seeds in (("dev", task.dev), ("test", task.test))
    }


def build_score_table(scores: EndTaskScores) -> tuple[list[str], list[list[float | int | str]]]:
    """Column names and one row per seed, for a tracker's `log_table`."""
    rows: list[list[float | int | str]] = [
        [name, seed.seed, task.metric, seed.dev.value(task.metric), seed.test.value(task.metric), seed.best_epoch]
        for name, task in scores.tasks.items()
        for seed in task.seeds
    ]
    return ["task", "seed", "metric", "dev", "test", "best_epoch"], rows


def _summarize(values: list[float]) -> SeedStatistics:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return SeedStatistics(mean=statistics.fmean(values), deviation=deviation)
