"""End-task scores of a run as a matrix, like its losses, with forgetting and transfer."""

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
from das_ds.run_dir import BASE_FOLDER, END_TASKS_FILE, RESULTS_FILE, RunDir, recorded_earlier_run_dirs
from das_ds.storage import Section

ScoreName = Literal["reported", "accuracy", "macro_f1", "micro_f1"]
SCORE_NAMES: tuple[ScoreName, ...] = ("reported", "accuracy", "macro_f1", "micro_f1")
"""The metric that each task reports, then each metric for all tasks."""


class ScoredTask(Section):
    """One column of the score matrix."""

    name: str
    domain: str | None
    """The task's domain; null: none, so the task does not count in forgetting and transfer."""
    row_learned: int
    """Row right after learning the domain, which may not exist yet; 0 without a domain."""
    metric: MetricName
    """The metric that the task reports."""
    seeds: list[int]
    """Fine-tuning seeds over which every score is averaged."""


class TaskForgetting(Section):
    """Score right after learning minus score after the last stage; see `reporting.transfer.forgetting`."""

    average: float | None
    """Mean over the domains before the last stage, each the mean of its tasks; null if there are none or a score is
    missing."""
    per_task: dict[str, float]
    """One value per task of such a domain, except where a score is missing."""


class ScoreMatrix(Section):
    """Scores of one kind."""

    scores: list[list[float | None]]
    """Mean test score: row 0 before training, row t after stage t; one column per task; null: not measured."""
    forgetting: TaskForgetting
    backward_transfer: float | None
    """Effect of later stages on earlier ones: minus the average forgetting."""
    forward_transfer: float | None
    """Score right before learning minus score before training, averaged in the same way; positive is better."""


class RunScores(Section):
    """Scores of all models of a run."""

    stages: list[str]
    """Row names, those of the loss matrix so far."""
    tasks: list[ScoredTask]
    """Columns, in the order in which they were first measured."""
    matrices: dict[ScoreName, ScoreMatrix]
    missing: list[str]
    """Missing or omitted scores, one sentence each."""


def read_run_scores(run_folder: Path) -> RunScores | None:
    """Scores of all models of a run, from `results.json` and every `end_tasks.json`; None if there is no such file.

    Raises:
        RunFolderError: a file is unreadable or damaged; scores of one task have different settings or no seed in
            common; a task's domain is not in the run.
    """
    results = Results.read(run_folder / RESULTS_FILE)
    paths = _score_paths(run_folder, results)
    rows = [EndTaskScores.read(path) if path.exists() else None for path in paths]
    names = list(dict.fromkeys(name for row in rows if row is not None for name in row.tasks))
    if not names:
        return None
    columns = [_Column(name, rows, paths, results.domains) for name in names]
    learned = learned_rows([column.domain for column in columns], results.learned)
    return RunScores(
        stages=results.stages,
        tasks=[column.to_task(int(row)) for column, row in zip(columns, learned, strict=True)],
        matrices={name: _build_matrix(name, columns, learned) for name in SCORE_NAMES},
        missing=[sentence for column in columns for sentence in column.describe_missing(results.stages)],
    )


class _Column:
    """One task over all stages.

    Args:
        name: of the task.
        rows: scores after each stage so far, None where no model was fine-tuned.
        paths: files of the rows, for error messages.
        domains: of the run.

    Raises:
        RunFolderError: its scores cannot be compared, or its domain is not in the run.
    """

    def __init__(
        self, name: str, rows: Sequence[EndTaskScores | None], paths: Sequence[Path], domains: Sequence[str]
    ) -> None:
        self.name = name
        self._entries = [row.tasks.get(name) if row is not None else None for row in rows]
        measured = [(entry, path) for entry, path in zip(self._entries, paths, strict=True) if entry is not None]
        for entry, path in measured[1:]:
            _check_same_settings(name, measured[0], (entry, path))
        # Fine-tuning again may correct the domain, so the newest file decides.
        self._newest, newest_path = measured[-1]
        self.domain = self._newest.domain or _guess_domain(name, domains)
        if self.domain is not None and self.domain not in domains:
            raise RunFolderError(
                f"{newest_path}: found domain {self.domain} of task {name}, expected one of {', '.join(domains)}; set "
                "tasks.N.domain to one of these and rerun finetune; existing scores are kept"
            )
        seeds = [{scores.seed for scores in entry.seeds} for entry, _ in measured]
        self._common_seeds = sorted(set.intersection(*seeds))
        self._omitted_seeds = sorted(set.union(*seeds) - set(self._common_seeds))
        if not self._common_seeds:
            raise RunFolderError(
                f"{measured[0][1].parent}: found no seed of task {name} that all of the run's {len(measured)} models "
                "were fine-tuned with, expected at least one (tasks.N.seeds)"
            )

    def to_task(self, row_learned: int) -> ScoredTask:
        return ScoredTask(
            name=self.name,
            domain=self.domain,
            row_learned=row_learned,
            metric=self._newest.metric,
            seeds=self._common_seeds,
        )

    def scores(self, kind: ScoreName) -> list[float]:
        """Mean test score after each stage; NaN where not measured."""
        metric = self._newest.metric if kind == "reported" else kind
        return [
            math.nan if entry is None else _mean_score(entry.seeds, self._common_seeds, metric)
            for entry in self._entries
        ]

    def describe_missing(self, stages: Sequence[str]) -> list[str]:
        sentences = []
        if absent := [stage for stage, entry in zip(stages, self._entries, strict=True) if entry is None]:
            sentences.append(f"{self.name} was not measured {', '.join(absent)}")
        if self._omitted_seeds:
            seeds = ", ".join(map(str, self._omitted_seeds))
            sentences.append(f"{self.name} has seeds {seeds} after some stages only; they are omitted")
        if self.domain is None:
            sentences.append(f"{self.name} belongs to no domain (tasks.N.domain) and counts in no mean")
        return sentences


def _build_matrix(kind: ScoreName, columns: Sequence[_Column], learned: torch.Tensor) -> ScoreMatrix:
    scores = torch.tensor([column.scores(kind) for column in columns], dtype=torch.float64).T  # (stages + 1, tasks)
    forgetting = transfer.forgetting(scores, learned, higher_is_better=True)
    forward_transfer = transfer.forward_transfer(scores, learned, higher_is_better=True)
    average_forgetting = transfer.average(forgetting, learned, transfer.has_forgetting(scores, learned))
    per_task = zip((column.name for column in columns), forgetting.tolist(), strict=True)
    return ScoreMatrix(
        scores=[[None if math.isnan(score) else score for score in row] for row in scores.tolist()],
        forgetting=TaskForgetting(
            average=average_forgetting,
            per_task={name: value for name, value in per_task if not math.isnan(value)},
        ),
        # Subtracting from 0 avoids -0.0.
        backward_transfer=None if average_forgetting is None else 0.0 - average_forgetting,
        forward_transfer=transfer.average(forward_transfer, learned, transfer.has_forward_transfer(scores, learned)),
    )


def _score_paths(run_folder: Path, results: Results) -> list[Path]:
    """For each row of the loss matrix so far, where its scores are if there are any.

    Those of models of an earlier run are in this run's folder, or beside the models.
    """
    stages = (stage_folder(index, stage_name(stage)) for index, stage in enumerate(results.learned))
    folders = [BASE_FOLDER, *stages][: len(results.loss_matrix)]
    paths = [run_folder / folder / END_TASKS_FILE for folder in folders]
    for run_dir, limit in recorded_earlier_run_dirs(RunDir(run_folder)):
        for row, folder in enumerate(folders[: limit + 1]):
            path = run_dir.root / folder / END_TASKS_FILE
            if not paths[row].exists() and path.exists():
                paths[row] = path
    return paths


def _check_same_settings(name: str, first: tuple[TaskScores, Path], other: tuple[TaskScores, Path]) -> None:
    first_scores, first_path = first
    scores, path = other
    if (first_scores.settings, first_scores.labels) == (scores.settings, scores.labels):
        return
    keys = {**first_scores.settings, **scores.settings}
    differing = [key for key in keys if first_scores.settings.get(key) != scores.settings.get(key)]
    raise RunFolderError(
        f"{path}: found task {name} with other settings than in {first_path} (they differ in "
        f"{', '.join(differing) or 'labels'}); move one of the files away and fine-tune its model again"
    )


def _guess_domain(task: str, domains: Sequence[str]) -> str | None:
    """The domain of the task's name, or of its longest prefix before a - or _."""
    matches = [domain for domain in domains if task == domain or task.startswith((f"{domain}_", f"{domain}-"))]
    return max(matches, key=len, default=None)


def _mean_score(scores: Sequence[SeedScores], seeds: Sequence[int], metric: MetricName) -> float:
    return statistics.fmean(one.test.value(metric) for one in scores if one.seed in seeds)
