"""Small end tasks and models, and fine-tuning on real ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from das_ds.config import RunConfig, TaskConfig
from das_ds.config.io import dump_config
from das_ds.distributed.process_group import init_process_group
from das_ds.downstream import run as finetune
from das_ds.downstream.scores import EndTaskScores, SeedScores
from das_ds.downstream.tasks import EndTask
from das_ds.reporting.results import build_results
from das_ds.reporting.run_report import write_report
from helpers.tiny_models import tiny_model
from helpers.tiny_tokenizer import tiny_tokenizer

OTHER_WORDS = ("we", "a", "of", "with", "was", "the", "for", "it", "and", "than")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """A .jsonl file; returns its name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def separable_rows(num_rows: int, kind: str = "text", shift: int = 0) -> list[dict[str, Any]]:
    """Rows whose label one word decides: food for soup, papers for parsing; in pairs that word stands alone."""
    rows = []
    for number in range(num_rows):
        label = ("food", "papers")[number % 2]
        word = {"food": "soup", "papers": "parsing"}[label]
        others = [OTHER_WORDS[(number * 3 + i * 7 + shift) % len(OTHER_WORDS)] for i in range(5)]
        if kind == "pair":
            rows.append({"text": " ".join(others), "aspect": word, "label": label})
            continue
        chosen = f"[[ {word} ]] was << {others[1]} >>" if kind == "entities" else word
        rows.append({"text": " ".join([*others[:2], chosen, *others[2:]]), "label": label})
    return rows


def small_task(folder: Path, kind: str = "text", **changes: Any) -> dict[str, Any]:
    """Config values of a separable task with its files."""
    sizes = {"train": 40, "dev": 12, "test": 16}
    files = {
        part: write_rows(folder / f"{kind}_{part}.jsonl", separable_rows(size, kind, shift))
        for shift, (part, size) in enumerate(sizes.items())
    }
    values = {"name": f"toy_{kind}", "kind": kind, "sequence_length": 32, "epochs": 8, "batch_size": 8, "seeds": [0]}
    return {**files, **values, "learning_rate": 3e-3, "patience": 8, **changes}


def task_run(folder: Path, tasks: list[dict[str, Any]]) -> RunConfig:
    """A run config with tasks; nothing else of it is there."""
    return RunConfig.model_validate(
        {
            "output_dir": folder / "run",
            "model": {"name_or_path": "none"},
            "domains": [{"name": "food", "train": ["none.txt"]}],
            "tasks": tasks,
            "wandb": {"mode": "disabled"},
        }
    )


def save_model(folder: Path, model_type: str = "bert") -> Path:
    """The model folder of the first domain of a run, with random weights."""
    model = folder / "run" / "domains" / "00_food" / "model"
    tokenizer = tiny_tokenizer()
    tiny_model(model_type, vocab_size=len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    return model


def scores_on_ranks(config: RunConfig, folder: Path) -> EndTaskScores:
    """Fine-tuning on these ranks."""
    return finetune.finetune_model(
        config, init_process_group(), folder, config.tasks, finetune.resolve_scores_path(config, folder, None)
    )


def jobs_of_a_start(config: RunConfig, folder: Path) -> list[tuple[str, int]]:
    """Tasks and seeds that a start trains on this rank."""
    jobs = []
    fine_tune = finetune.fine_tune

    def noted(task: EndTask, seed: int, *args: Any, **options: Any) -> SeedScores:
        jobs.append((task.config.name, seed))
        return fine_tune(task, seed, *args, **options)

    finetune.fine_tune = noted
    try:
        scores_on_ranks(config, folder)
    finally:
        finetune.fine_tune = fine_tune
    return jobs


def finished_run(folder: Path, tasks: list[dict[str, Any]]) -> RunConfig:
    """The files of a run over two domains that started from a saved model, whose config was recorded without tasks."""
    base = folder / "base"
    tokenizer = tiny_tokenizer()
    config = RunConfig.model_validate(
        {
            "output_dir": folder / "run",
            "model": {"name_or_path": str(base)},
            "domains": [{"name": name, "train": ["none.txt"]} for name in ("food", "papers")],
            "wandb": {"mode": "disabled"},
        }
    )
    models = [base, *(folder / "run" / "domains" / name / "model" for name in ("00_food", "01_papers"))]
    for seed, model in enumerate(models):
        tiny_model("bert", seed=seed, vocab_size=len(tokenizer)).save_pretrained(model)
        tokenizer.save_pretrained(model)
    dump_config(config, folder / "run" / "config.yaml")
    results = build_results(
        method="ncl",
        domains=["food", "papers"],
        eval_domains=["food", "papers"],
        loss_matrix=[[5.0, 5.0], [4.0, 4.5], [4.2, 4.0]],
        tokens_seen=8,
        wall_seconds=1.0,
        world_size=1,
        zero_stage=0,
    )
    results.write(folder / "run" / "results.json")
    write_report(folder / "run", results, None)
    return config.model_copy(update={"tasks": [TaskConfig.model_validate(task) for task in tasks]})


def jobs_over_a_run(config: RunConfig, failing: str = "") -> tuple[list[str], list[tuple[str, str, int]]]:
    """Stages of a run that a start fine-tunes, and (folder, task, seed) of what it trains on this rank.

    Args:
        config: of the run.
        failing: folder of a model whose training is interrupted.
    """
    ranks = init_process_group()
    jobs = []
    fine_tune = finetune.fine_tune

    def noted(task: EndTask, seed: int, source: Any, *args: Any, **options: Any) -> SeedScores:
        folder = Path(source.name_or_path).parent.name
        if folder == failing:
            raise KeyboardInterrupt
        jobs.append((folder, task.config.name, seed))
        return fine_tune(task, seed, source, *args, **options)

    finetune.fine_tune = noted
    models = finetune.list_scored_models(config, ranks)
    try:
        finetune.finetune_models(config, ranks, models, config.tasks)
    except KeyboardInterrupt:
        pass
    finally:
        finetune.fine_tune = fine_tune
    return [model.stage for model in models], jobs
