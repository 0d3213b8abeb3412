"""The finetune command: all tasks and seeds, finished jobs are skipped, mistakes are one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from das_ds.cli import main
from das_ds.config import ModelConfig
from das_ds.config.io import dump_config, load_config
from das_ds.downstream.run import resolve_scores_path
from das_ds.downstream.scores import EndTaskScores
from das_ds.errors import ConfigError
from das_ds.reporting.results import build_results
from das_ds.run_dir import END_TASKS_FILE, RESULTS_FILE, open_run_dir
from das_ds.storage import write_checksums
from helpers.commands import program
from helpers.end_tasks import (
    finished_run,
    jobs_of_a_start,
    jobs_over_a_run,
    save_model,
    scores_on_ranks,
    small_task,
    task_run,
)
from helpers.html_pages import Page
from helpers.run_ranks import run_ranks

QUICK = {"epochs": 1, "learning_rate": 1e-3}


def two_tasks(folder: Path) -> list[dict[str, Any]]:
    return [small_task(folder, seeds=[0, 1], **QUICK), small_task(folder, "pair", seeds=[3], **QUICK)]


@pytest.mark.multirank
def test_finetune_model_two_ranks_equal_one(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    config = task_run(tmp_path, two_tasks(tmp_path))
    path = model.parent / END_TASKS_FILE
    (alone,) = run_ranks(scores_on_ranks, 1, config, model)
    assert EndTaskScores.read(path) == alone
    assert {name: [done.seed for done in entry.seeds] for name, entry in alone.tasks.items()} == {
        "toy_text": [0, 1],
        "toy_pair": [3],
    }
    path.unlink()
    for scores in run_ranks(scores_on_ranks, 2, config, model):
        assert scores == alone
    assert EndTaskScores.read(path) == alone


@pytest.mark.multirank
def test_finetune_model_skips_finished_jobs(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    path = model.parent / END_TASKS_FILE
    done = run_ranks(scores_on_ranks, 1, task_run(tmp_path, two_tasks(tmp_path)[:1]), model)[0]
    assert list(done.tasks) == ["toy_text"]
    more = [small_task(tmp_path, seeds=[1, 2, 0], **QUICK), small_task(tmp_path, "pair", seeds=[3], **QUICK)]
    continued = run_ranks(jobs_of_a_start, 1, task_run(tmp_path, more), model)[0]
    assert continued == [("toy_text", 2), ("toy_pair", 3)]
    assert EndTaskScores.read(path).tasks["toy_text"].seeds[:2] == done.tasks["toy_text"].seeds


@pytest.mark.multirank
def test_finetune_model_failure_keeps_results_of_other_ranks(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    tasks = [small_task(tmp_path, seeds=[0], **QUICK), small_task(tmp_path, "pair", **QUICK) | {"learning_rate": 1e30}]
    with pytest.raises(RuntimeError, match="TrainingError: task toy_pair, seed 0: the loss of epoch 1"):
        run_ranks(scores_on_ranks, 2, task_run(tmp_path, tasks), model)
    scores = EndTaskScores.read(model.parent / END_TASKS_FILE)
    assert scores.has("toy_text", 0) and not scores.has("toy_pair", 0)


def test_finetune_model_modified_export_raises(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    write_checksums(model)
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    with pytest.raises(RuntimeError, match=r"ModelError: .*config\.json missing or not as exported"):
        run_ranks(scores_on_ranks, 1, task_run(tmp_path, two_tasks(tmp_path)), model)


def test_finetune_command_prints_and_records_scores(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    results = build_results(
        method="ncl",
        domains=["food"],
        eval_domains=["food"],
        loss_matrix=[[5.0], [4.0]],
        tokens_seen=8,
        wall_seconds=1.0,
        world_size=1,
        zero_stage=0,
    )
    results.write(tmp_path / "run" / RESULTS_FILE)
    (tmp_path / "run" / "report").mkdir()
    config = tmp_path / "run.yaml"
    dump_config(task_run(tmp_path, two_tasks(tmp_path)), config)
    words = ("launch/finetune.py", "--config", config, "--model", model, "--task", "toy_pair")
    done = program(*words, "tasks.1.metric=accuracy", "wandb.mode=offline")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout.splitlines()[-1])
    entry = EndTaskScores.read(model.parent / END_TASKS_FILE).tasks["toy_pair"]
    assert list(shown) == ["toy_pair"] and shown["toy_pair"]["metric"] == "accuracy"
    assert shown["toy_pair"]["test"] == {"mean": entry.seeds[0].test.accuracy, "deviation": None}
    assert list((model.parent / "wandb").glob("offline-run-*")) and not (tmp_path / "run" / "wandb").exists()
    # The report of the run has the score too.
    page = Page((tmp_path / "run" / "report" / "index.html").read_text())
    (table,) = [table for table in page.tables if table[0][1:2] == ["toy_pair (accuracy, 1 seeds)"]]
    assert [row[1] for row in table[1:3]] == ["-", f"{entry.seeds[0].test.accuracy:.4f}"]
    # Not a terminal, so no bar.
    assert "epoch 1" not in done.stderr and "LOAD REPORT" not in done.stderr


@pytest.mark.multirank
def test_finetune_run_scores_all_models_and_continues_where_it_was_interrupted(tmp_path: Path) -> None:
    config = finished_run(tmp_path, [small_task(tmp_path, seeds=[0, 1], **QUICK)])
    first, second = run_ranks(jobs_over_a_run, 1, config, "01_papers")[0], run_ranks(jobs_over_a_run, 1, config)[0]
    assert first[0] == second[0] == ["base", "food", "papers"]
    # The base is a folder beside the run.
    assert first[1] == [(name, "toy_text", seed) for name in (tmp_path.name, "00_food") for seed in (0, 1)]
    assert second[1] == [("01_papers", "toy_text", 0), ("01_papers", "toy_text", 1)]
    # Where the base is no longer, its row is left out; exports that were moved away are too.
    (tmp_path / "base").rename(tmp_path / "moved")
    (tmp_path / "run" / "domains" / "01_papers" / "model").rename(tmp_path / "moved_too")
    third = run_ranks(jobs_over_a_run, 2, config)
    assert third == [(["food"], [])] * 2


def test_finetune_run_command_writes_both_reports(tmp_path: Path) -> None:
    task = small_task(tmp_path, seeds=[0], name="food_task", **QUICK)
    config = finished_run(tmp_path, [task])
    path = tmp_path / "with_tasks.yaml"
    dump_config(config, path)
    run = tmp_path / "elsewhere"
    (tmp_path / "run").rename(run)
    done = program("launch/finetune.py", "--run", run, "--config", path)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout.splitlines()[-1])
    assert list(shown) == ["base", "food", "papers"]
    scores = [shown[stage]["food_task"]["test"]["mean"] for stage in shown]
    page = Page((run / "report" / "index.html").read_text())
    (table,) = [table for table in page.tables if table[0][1:] == ["food_task (macro_f1, 1 seeds)"]]
    assert [row[1] for row in table[1:4]] == [f"{score:.4f}" for score in scores]
    text = (run / "report" / "report.md").read_text()
    assert f"{scores[1] - scores[2]:+.4f}" in text[text.index("forgetting rate |") :] and "As accuracy." in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--run", "{0}/none"], "--run {0}/none: found no config.yaml there, expected the folder of a run"),
        (["--run", "{0}/run"], "tasks: found none in {0}/run/config.yaml, expected at least one with name, train, dev"),
        (["--run", "{0}/run", "--config", "{0}/other.yaml"], "output_dir: {0}/run belongs to another run; its config"),
        (
            ["--run", "{0}/run", "--config", "{0}/tasks.yaml", "--output", "scores.json"],
            "--output: found scores.json with --run, whose scores are next to each model; expected none",
        ),
        (["--model", "{0}/base"], "--config: found none with --model, expected the run config that has the tasks"),
    ],
)
def test_finetune_run_command_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    config = finished_run(tmp_path, two_tasks(tmp_path))
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    dump_config(config, tmp_path / "tasks.yaml")
    dump_config(config.model_copy(update={"seed": 1}), tmp_path / "other.yaml")
    # Bars of the library that saved the models.
    capsys.readouterr()
    assert main(["finetune", *(word.format(tmp_path) for word in words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("das_ds: " + expected.format(tmp_path)) and error.count("\n") == 1


def test_finetune_run_without_exports_is_one_line(tmp_path: Path) -> None:
    config = finished_run(tmp_path, two_tasks(tmp_path))
    for folder in (tmp_path / "base", *(tmp_path / "run" / "domains").iterdir()):
        folder.rename(tmp_path / f"moved_{folder.name}")
    with pytest.raises(RuntimeError, match=r"RunFolderError: --run .*/run: found no exported model, expected at least"):
        run_ranks(jobs_over_a_run, 1, config)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--task", "rte"], "--task rte: no such task, allowed: toy_text, toy_pair"),
        ([], "elsewhere: found neither a model of a run (domains/<ii>_<name>/model) nor the config's"),
        (["tasks=[]"], "tasks: found none, expected at least one with name, train, dev and test"),
    ],
)
def test_finetune_command_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], expected: str
) -> None:
    path = tmp_path / "run.yaml"
    dump_config(task_run(tmp_path, two_tasks(tmp_path)), path)
    assert main(["finetune", "--config", str(path), "--model", str(tmp_path / "elsewhere"), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("das_ds: ") and error.count("\n") == 1 and expected in error


def test_resolve_scores_path(tmp_path: Path) -> None:
    config = task_run(tmp_path, [])
    model = tmp_path / "domains" / "01_acl" / "model"
    assert resolve_scores_path(config, model, None) == tmp_path / "domains" / "01_acl" / END_TASKS_FILE
    assert resolve_scores_path(config, tmp_path, tmp_path / "base.json") == tmp_path / "base.json"
    # Also where the base is a domain's model of another run.
    config = config.model_copy(update={"model": ModelConfig(name_or_path=str(model))})
    assert resolve_scores_path(config, model, None) == tmp_path / "run" / "base" / END_TASKS_FILE


@pytest.mark.multirank
def test_finetune_command_scores_base_before_run(tmp_path: Path) -> None:
    base = save_model(tmp_path / "elsewhere")
    config = task_run(tmp_path, [small_task(tmp_path, **QUICK)])
    config = config.model_copy(update={"model": ModelConfig(name_or_path=str(base))})
    done = run_ranks(scores_on_ranks, 1, config, base)[0]
    assert EndTaskScores.read(tmp_path / "run" / "base" / END_TASKS_FILE) == done
    assert open_run_dir(config).root == tmp_path / "run"
    # Nothing is to be done but to say where the task belongs.
    task = config.tasks[0].model_copy(update={"domain": "food"})
    moved = run_ranks(scores_on_ranks, 1, config.model_copy(update={"tasks": [task]}), base)[0]
    assert EndTaskScores.read(tmp_path / "run" / "base" / END_TASKS_FILE) == moved != done
    assert moved.tasks["toy_text"] == done.tasks["toy_text"].model_copy(update={"domain": "food"})


def test_finetune_model_uncreatable_folder_raises(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    base = save_model(tmp_path / "elsewhere")
    config = task_run(tmp_path, [small_task(tmp_path, **QUICK)])
    config = config.model_copy(update={"model": ModelConfig(name_or_path=str(base))})
    with pytest.raises(RuntimeError, match=r"RunFolderError: output_dir: cannot create .*run/base: Not a directory"):
        run_ranks(scores_on_ranks, 1, config, base)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seeds": [1, 1]}, "tasks.0: seeds: found [1, 1], allowed: each once"),
        ({"seeds": [-1]}, "tasks.0.seeds.0: found -1, allowed: list of integer >= 0 and < 4294967296, at least 1"),
        ({"labels": ["a"]}, "tasks.0: found labels ['a'] and markers"),
        ({"metric": "f1"}, "tasks.0.metric: found 'f1', allowed: accuracy | macro_f1 | micro_f1"),
        ({"patients": 1}, "tasks.0.patients: unknown key; did you mean tasks.0.patience?"),
        ({"domain": "papers"}, "tasks.0.domain: found papers, allowed: null or food"),
        ({"name": "toy_pair"}, "tasks: names must differ, found more than once: toy_pair"),
    ],
)
def test_tasks_config_wrong_key_raises(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    values = task_run(tmp_path, two_tasks(tmp_path)).model_dump(mode="json")
    values["tasks"][0] |= changes
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)
