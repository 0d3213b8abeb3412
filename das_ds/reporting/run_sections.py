"""Sections of a run's report that are not from its results: learning curves and settings (index.html), end tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from das_ds.config import RunConfig
from das_ds.config.io import config_values, load_config, values_set
from das_ds.errors import ConfigError, RunFolderError
from das_ds.reporting.document import Block, Plot, Section, Table, Text
from das_ds.reporting.learning_curves import plot_learning_curves, read_learning_curves
from das_ds.reporting.score_matrix import RunScores, ScoreMatrix, ScoreName, read_run_scores
from das_ds.reporting.tables import Row
from das_ds.run_dir import CONFIG_FILE, RESULTS_FILE

END_TASKS = "End tasks"
METRICS: dict[ScoreName, str] = {"macro_f1": "macro-F1", "accuracy": "accuracy"}
"""Metrics that the report has for all tasks -> their names there."""
NONE = "-"


def learning_section(run_folder: Path, config: RunConfig | None) -> list[Section]:
    """Training loss over tokens; [] before the first logged step."""
    curves = read_learning_curves(run_folder)
    if not curves:
        return []
    text = "Training loss by domain, with all terms of the method; a domain begins where the one before it ended."
    if config is not None and config.continue_from is not None:
        text += f" Those of earlier domains, and their plasticity, are in the report of {config.continue_from.run}."
    plot = Plot("learning_curves", partial(plot_learning_curves, curves))
    return [Section("Learning curves", [Text(text), plot], only="html")]


def end_task_section(run_folder: Path) -> list[Section]:
    """Test scores of exported models on end tasks; [] if none was fine-tuned."""
    try:
        scores = read_run_scores(run_folder) if (run_folder / RESULTS_FILE).exists() else None
    except RunFolderError as error:
        # Scores come from another command and are no part of training, which writes this report too.
        return [Section(END_TASKS, [Text(f"Omitted: {error}.")])]
    return [] if scores is None else [_end_tasks(scores)]


def settings_section(config: RunConfig | None) -> list[Section]:
    """Config keys that differ from their defaults, and all keys; [] without a config."""
    if config is None:
        return []
    header = ["key", "value"]
    changed = [[key, value] for key, value in values_set(config).items()]
    every = [[key, value] for key, value in config_values(config).items()]
    blocks: list[Block] = [
        Text("Keys that are required or differ from their defaults."),
        Table([header, *changed], text_columns=(0, 1)),
        Table([header, *every], text_columns=(0, 1), summary=f"All {len(every)} keys"),
    ]
    return [Section("Settings", blocks, only="html")]


def read_recorded_config(run_folder: Path) -> RunConfig | None:
    """The config of a run; None where it cannot be read."""
    try:
        return load_config(run_folder / CONFIG_FILE)
    except ConfigError:
        return None


def _end_tasks(scores: RunScores) -> Section:
    names = [f"{task.name} ({task.metric}, {len(task.seeds)} seeds)" for task in scores.tasks]
    text = "Test scores of the model after each stage, mean over seeds of fine-tuning; higher is better."
    blocks: list[Block] = [Text(text), Table(_score_rows(scores, scores.matrices["reported"], names))]
    others = {name: label for name, label in METRICS.items() if any(task.metric != name for task in scores.tasks)}
    for name, label in others.items():
        rows = _score_rows(scores, scores.matrices[name], [task.name for task in scores.tasks])
        blocks += [Text(f"As {label}.", only="markdown"), Table(rows, only="markdown")]
        blocks.append(Table(rows, summary=f"As {label}", only="html"))
    rates = (
        "Means over domains, each the mean of its tasks. The forgetting rate is the score right after a domain was\n"
        "learned minus the score after the last one; above 0: forgotten."
    )
    blocks += [Text(rates), Table(_rate_rows(scores, {"reported": "as reported", **others}))]
    blocks += [Text(f"{sentence}.") for sentence in scores.missing]
    return Section(END_TASKS, blocks)


def _score_rows(scores: RunScores, matrix: ScoreMatrix, names: Sequence[str]) -> list[Row]:
    """A row per stage and a column per task, and what was forgotten of each."""
    forgotten = matrix.forgetting.per_task
    return [
        ["stage", *names],
        *([stage, *map(_score, row)] for stage, row in zip(scores.stages, matrix.scores, strict=True)),
        ["forgetting", *(_change(forgotten.get(task.name)) for task in scores.tasks)],
    ]


def _rate_rows(scores: RunScores, names: Mapping[ScoreName, str]) -> list[Row]:
    rows: list[Row] = [["score", "forgetting rate", "backward transfer", "forward transfer"]]
    for name, label in names.items():
        matrix = scores.matrices[name]
        values = (matrix.forgetting.average, matrix.backward_transfer, matrix.forward_transfer)
        rows.append([label, *map(_change, values)])
    return rows


def _score(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def _change(value: float | None) -> str:
    return NONE if value is None else f"{value:+.4f}"
