"""Sections of a run's page, index.html, that report.md does not have: learning curves, end tasks, settings."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from das_ds.config.io import config_values, load_config, values_set
from das_ds.errors import ConfigError, RunFolderError
from das_ds.reporting.document import Block, Plot, Section, Table, Text
from das_ds.reporting.learning_curves import plot_learning_curves, read_learning_curves
from das_ds.reporting.score_matrix import RunScores, read_run_scores
from das_ds.run_dir import CONFIG_FILE, RESULTS_FILE

NONE = "-"


def learning_section(run_folder: Path) -> list[Section]:
    """Training loss over tokens; [] before the first logged step."""
    curves = read_learning_curves(run_folder)
    if not curves:
        return []
    text = "Training loss by domain, with all terms of the method; a domain begins where the one before it ended."
    plot = Plot("learning_curves", partial(plot_learning_curves, curves))
    return [Section("Learning curves", [Text(text), plot], only="html")]


def end_task_section(run_folder: Path) -> list[Section]:
    """Test scores of exported models on end tasks; [] if none was fine-tuned."""
    try:
        scores = read_run_scores(run_folder) if (run_folder / RESULTS_FILE).exists() else None
    except RunFolderError as error:
        # Scores come from another command and are no part of training, which writes this report too.
        return [Section("End tasks", [Text(f"Omitted: {error}")], only="html")]
    return [] if scores is None else [_end_tasks(scores)]


def settings_section(run_folder: Path) -> list[Section]:
    """Config keys that differ from their defaults, and all keys; [] without a config that can be read."""
    try:
        config = load_config(run_folder / CONFIG_FILE)
    except ConfigError:
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


def _end_tasks(scores: RunScores) -> Section:
    matrix = scores.matrices["reported"]
    names = [f"{task.name} ({task.metric}, {len(task.seeds)} seeds)" for task in scores.tasks]
    rows = [
        [stage, *(NONE if score is None else f"{score:.4f}" for score in row)]
        for stage, row in zip(scores.stages, matrix.scores, strict=True)
    ]
    forgetting = [
        "forgetting",
        *(
            NONE if (value := matrix.forgetting.per_task.get(task.name)) is None else f"{value:+.4f}"
            for task in scores.tasks
        ),
    ]
    text = "Test scores of the model after each stage, mean over seeds of fine-tuning; higher is better."
    blocks: list[Block] = [Text(text), Table([["stage", *names], *rows, forgetting])]
    blocks += [Text(f"{sentence}.") for sentence in scores.missing]
    return Section("End tasks", blocks, only="html")
