"""Benchmark scores of a run as a matrix of benchmarks by models, and the items that changed between models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from das_ds.benchmark.rules import Transitions, adjust_for_chance, compare_items
from das_ds.benchmark.scores import BenchmarkScores, ModelBenchmarks
from das_ds.reporting.results import BEFORE_TRAINING
from das_ds.run_dir import BASE_FOLDER, BENCHMARKS_FILE, RunDir, recorded_earlier_run_dirs


@dataclass(frozen=True)
class BenchmarkRow:
    """One benchmark over the models of a run; lists have an entry per model, None where it was not scored."""

    name: str
    rule: str
    num_items: int
    chance: float | None
    guessing: float | None
    accuracy: list[float | None]
    bits_per_byte: list[float | None]
    transitions: list[Transitions | None]
    """Against the model before training; None also for that model, and where the items are unknown."""

    @property
    def adjusted(self) -> list[float | None]:
        """Accuracy adjusted for chance, see `rules.adjust_for_chance`; None also where chance is unknown."""
        chance = self.chance
        if chance is None:
            return [None] * len(self.accuracy)
        return [None if value is None else adjust_for_chance(value, chance) for value in self.accuracy]


@dataclass(frozen=True)
class BenchmarkMatrix:
    """All benchmarks of a run."""

    stages: list[str]
    """Names of the models: `before training`, `after <domain>`."""
    rows: list[BenchmarkRow]
    omitted: list[str]
    """Scores on other items than the newest ones, which are left out; a sentence each."""

    @property
    def mean_adjusted(self) -> list[float] | None:
        """Mean over the benchmarks that every model was scored on; None if there is none."""
        complete = [[value for value in row.adjusted if value is not None] for row in self.rows]
        columns = list(zip(*(values for values in complete if len(values) == len(self.stages)), strict=True))
        return [sum(column) / len(column) for column in columns] or None

    @property
    def summary(self) -> dict[str, dict[str, float]]:
        """Benchmark -> model -> accuracy."""
        return {
            row.name: {
                stage: value for stage, value in zip(self.stages, row.accuracy, strict=True) if value is not None
            }
            for row in self.rows
        }


def read_benchmark_matrix(run_folder: Path) -> BenchmarkMatrix | None:
    """The benchmark scores in a run folder; None if no model was scored.

    Raises:
        RunFolderError: a file is damaged.
    """
    paths = _list_score_files(run_folder)
    models = [ModelBenchmarks.read(path) for path in paths]
    names = list(dict.fromkeys(name for model in models for name in model.tasks))
    if not names:
        return None
    stages = [_stage_name(path) for path in paths]
    omitted: list[str] = []
    rows = [_build_row(name, [model.tasks.get(name) for model in models], stages, omitted) for name in names]
    return BenchmarkMatrix(stages, rows, omitted)


def _build_row(
    name: str, recorded: Sequence[BenchmarkScores | None], stages: Sequence[str], omitted: list[str]
) -> BenchmarkRow:
    newest = next(scores for scores in reversed(recorded) if scores is not None)
    same = [scores if scores is not None and _are_comparable(scores, newest) else None for scores in recorded]
    for stage, before, kept in zip(stages, recorded, same, strict=True):
        if before is not None and kept is None:
            omitted.append(f"{name} {stage} was scored on other items than {_last_stage(stages, recorded)}")
    base = same[0] if stages[0] == BEFORE_TRAINING else None
    return BenchmarkRow(
        name=name,
        rule=newest.rule,
        num_items=newest.num_items,
        chance=newest.chance,
        guessing=newest.guessing,
        accuracy=[None if scores is None else scores.accuracy.get(newest.rule) for scores in same],
        bits_per_byte=[None if scores is None else scores.bits_per_byte for scores in same],
        transitions=[None if scores is base else _compare(base, scores, newest.rule) for scores in same],
    )


def _are_comparable(first: BenchmarkScores, second: BenchmarkScores) -> bool:
    return (first.source, first.settings) == (second.source, second.settings)


def _last_stage(stages: Sequence[str], recorded: Sequence[BenchmarkScores | None]) -> str:
    return [stage for stage, scores in zip(stages, recorded, strict=True) if scores is not None][-1]


def _compare(before: BenchmarkScores | None, after: BenchmarkScores | None, rule: str) -> Transitions | None:
    if before is None or after is None or rule not in before.correct or rule not in after.correct:
        return None
    return compare_items(before.correct[rule], after.correct[rule])


def _list_score_files(run_folder: Path) -> list[Path]:
    """Of the model before training, then of those after each stage, in order.

    Of a model of an earlier run, the file in this run's folder comes before that beside the model.
    """
    files: dict[int, Path] = {}
    own = RunDir(run_folder)
    for run_dir, limit in [(own, None), *recorded_earlier_run_dirs(own)]:
        paths = (run_dir.root / BASE_FOLDER / BENCHMARKS_FILE, *run_dir.root.glob(f"domains/*/{BENCHMARKS_FILE}"))
        for path in filter(Path.exists, paths):
            row = _row(path.parent.name)
            if limit is None or row <= limit:
                files.setdefault(row, path)
    return [files[row] for row in sorted(files)]


def _row(folder: str) -> int:
    """Row of the loss matrix that the model of a folder has: 0 for the base, 1 for the domain with number 0."""
    match = re.match(r"\d+", folder)
    return int(match[0]) + 1 if match else 0


def _stage_name(path: Path) -> str:
    folder = path.parent
    return BEFORE_TRAINING if folder.name == BASE_FOLDER else f"after {folder.name.partition('_')[2]}"
