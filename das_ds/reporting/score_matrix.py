"""End-task scores of a run: a matrix like that of its losses, and what it says about forgetting and transfer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from das_ds.config.stage import stage_folder, stage_name
from das_ds.downstream.scores import EndTaskScores, MetricName, SeedScores, TaskScores
from das_ds.errors import RunFolderError
from das_ds.reporting import transfer
from das_ds.reporting.results import Results, learned_rows
from das_ds.run_dir import BASE_FOLDER, END_TASKS_FILE, RESULTS_FILE
from das_ds.storage import Section

ScoreName = Literal["reported", "accuracy", "macro_f1", "micro_f1"]
SCORE_NAMES: tuple[ScoreName, ...] = ("reported", "accuracy", "macro_f1", "micro_f1")
"""The metric that each task reports, and each metric for all tasks."""


class ScoredTask(Section):
    """One column."""

    name: str
    domain: str | None
    """The domain whose end task it is; null: none, so that it counts in no forgetting and no transfer."""
    row_learned: int
    """Row right after learning the domain, which may not be there yet; 0 without one."""
    metric: MetricName
    """The reported one."""
    seeds: list[int]
    """Seeds that every score is the mean of."""


class TaskForgetting(Section):
    """Score right after learning minus score after the last stage; see `reporting.transfer.forgetting`."""

    average: float | None
    """Mean over the domains before the last stage, each the mean of its tasks; null where there is none, or where a
    score is missing."""
    per_task: dict[str, float]
    """One number per task of such a domain, but for missing scores."""


class ScoreMatrix(Section):
    """One kind of score."""

    scores: list[list[float | None]]
    """Mean test score: row 0 before training, row t after stage t; one column per task; null: not measured."""
    forgetting: TaskForgetting
    backward_transfer: float | None
    """What later stages did for earlier ones: minus the average forgetting."""
    forward_transfer: float | None
    """Score right before learning minus score before training, averaged in the same way; positive is good."""


class RunScores(Section):
    """Everything that a run's models score."""

    stages: list[str]
    """Row names, those of the loss matrix so far."""
    tasks: list[ScoredTask]
    """Columns, in the order in which they were first measured."""
    matrices: dict[ScoreName, ScoreMatrix]
    missing: list[str]
    """What was not measured or left out, a sentence each."""


def read_run_scores(run_folder: Path) -> RunScores | None:
    """Scores of all models of a run, from its `results.json` and every `end_tasks.json`; None where there is no such.

    Raises:
        RunFolderError: a file that cannot be read or is damaged; scores of one task with different settings or without
            a seed in common; a task of a domain that the run has not.
    """
    results = Results.read(run_folder / RESULTS_FILE)
    paths = _paths(run_folder, results)
    rows = [EndTaskScores.read(path) if path.exists() else None for path in paths]
    names = list(dict.fromkeys(name for row in rows if row is not None for name in row.tasks))
    if not names:
        return None
    columns = [_Column(name, rows, paths, results.domains) for name in names]
    learned = learned_rows([column.domain for column in columns], results.learned)
    return RunScores(
        stages=results.stages,
        tasks=[column.described(int(row)) for column, row in zip(columns, learned, strict=True)],
        matrices={name: _matrix(name, columns, learned) for name in SCORE_NAMES},
        missing=[sentence for column in columns for sentence in column.missing(results.stages)],
    )


class _Column:
    """One task over all stages.

    Raises:
        RunFolderError: its scores do not belong together, or its domain not to the run.
    """

    def __init__(
        self, name: str, rows: Sequence[EndTaskScores | None], paths: Sequence[Path], domains: Sequence[str]
    ) -> None:
        self.name = name
        self._entries = [row.tasks.get(name) if row is not None else None for row in rows]
        there = [(entry, path) for entry, path in zip(self._entries, paths, strict=True) if entry is not None]
        for entry, path in there[1:]:
            _check_alike(name, there[0], (entry, path))
        # The newest file knows best where the task belongs.
        self._newest = there[-1][0]
        self.domain = self._newest.domain or _domain_by_name(name, domains)
        if self.domain is not None and self.domain not in domains:
            raise RunFolderError(
                f"{there[-1][1]}: task {name} belongs to domain {self.domain}, the run has {', '.join(domains)}; mend "
                "tasks.N.domain and fine-tune again, which changes the domain alone"
            )
        seeds = [{done.seed for done in entry.seeds} for entry, _ in there]
        self._seeds, self._left_out = sorted(set.intersection(*seeds)), sorted(set.union(*seeds))
        if not self._seeds:
            raise RunFolderError(
                f"{there[0][1].parent}: found no seed of task {name} that all of the run's {len(there)} models were "
                "fine-tuned with, expected at least one (tasks.N.seeds)"
            )

    def described(self, row_learned: int) -> ScoredTask:
        return ScoredTask(
            name=self.name,
            domain=self.domain,
            row_learned=row_learned,
            metric=self._newest.metric,
            seeds=self._seeds,
        )

    def scores(self, kind: ScoreName) -> list[float]:
        """Mean test score of every stage; NaN where there is none."""
        metric = self._newest.metric if kind == "reported" else kind
        return [math.nan if entry is None else _mean(entry.seeds, self._seeds, metric) for entry in self._entries]

    def missing(self, stages: Sequence[str]) -> list[str]:
        sentences = []
        if absent := [stage for stage, entry in zip(stages, self._entries, strict=True) if entry is None]:
            sentences.append(f"{self.name} was not measured {', '.join(absent)}")
        if left_out := [str(seed) for seed in self._left_out if seed not in self._seeds]:
            sentences.append(f"{self.name} has seeds {', '.join(left_out)} after some stages only; they are left out")
        if self.domain is None:
            sentences.append(f"{self.name} belongs to no domain (tasks.N.domain) and counts in no mean")
        return sentences


def _matrix(kind: ScoreName, columns: Sequence[_Column], learned: torch.Tensor) -> ScoreMatrix:
    scores = torch.tensor([column.scores(kind) for column in columns], dtype=torch.float64).T
    forgotten = transfer.forgetting(scores, learned, higher_is_better=True)
    helped = transfer.forward_transfer(scores, learned, higher_is_better=True)
    average = transfer.average(forgotten, learned, transfer.has_forgetting(scores, learned))
    per_task = zip((column.name for column in columns), forgotten.tolist(), strict=True)
    return ScoreMatrix(
        scores=[[None if math.isnan(score) else score for score in row] for row in scores.tolist()],
        forgetting=TaskForgetting(
            average=average, per_task={name: value for name, value in per_task if not math.isnan(value)}
        ),
        # Subtracting from 0 keeps nothing forgotten from being written as -0.0.
        backward_transfer=None if average is None else 0.0 - average,
        forward_transfer=transfer.average(helped, learned, transfer.has_forward_transfer(scores, learned)),
    )


def _paths(run_folder: Path, results: Results) -> list[Path]:
    """Where the scores of each row of the loss matrix so far are, if there are any."""
    stages = (stage_folder(index, stage_name(stage)) for index, stage in enumerate(results.learned))
    folders = [BASE_FOLDER, *stages][: len(results.loss_matrix)]
    return [run_folder / folder / END_TASKS_FILE for folder in folders]


def _check_alike(name: str, first: tuple[TaskScores, Path], other: tuple[TaskScores, Path]) -> None:
    (mine, my_path), (theirs, their_path) = first, other
    if (mine.settings, mine.labels) == (theirs.settings, theirs.labels):
        return
    keys = [key for key in {**mine.settings, **theirs.settings} if mine.settings.get(key) != theirs.settings.get(key)]
    raise RunFolderError(
        f"{their_path}: task {name} was done with other settings than in {my_path} (they differ in "
        f"{', '.join(keys) or 'labels'}); move one of the files away and fine-tune its model again"
    )


def _domain_by_name(task: str, domains: Sequence[str]) -> str | None:
    """The domain of the task's name, or of its longest beginning up to a - or _."""
    fitting = [domain for domain in domains if task == domain or task.startswith((f"{domain}_", f"{domain}-"))]
    return max(fitting, key=len, default=None)


def _mean(done: Sequence[SeedScores], seeds: Sequence[int], metric: MetricName) -> float:
    return statistics.fmean(scores.test.of(metric) for scores in done if scores.seed in seeds)
