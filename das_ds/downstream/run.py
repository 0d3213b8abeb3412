"""Fine-tunes an exported model on the end tasks of a config: all tasks and seeds, distributed over the ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from das_ds.config import ModelConfig, RunConfig, TaskConfig
from das_ds.distributed.process_group import ProcessGroup
from das_ds.downstream.classifier import check_model_folder, list_weight_files
from das_ds.downstream.finetune import fine_tune
from das_ds.downstream.scores import EndTaskScores, SeedScores, build_score_table, mean_scores, open_scores
from das_ds.downstream.tasks import EndTask, read_task
from das_ds.errors import ConfigError, DasError, RunFolderError
from das_ds.models.loading import check_files
from das_ds.run_dir import BASE_FOLDER, END_TASKS_FILE
from das_ds.storage import checksum
from das_ds.tracking.tracker import Tracker, build_job_tracker
from das_ds.tracking.wandb_sink import WandbJob

JOB_TYPE = "finetune"


def finetune_model(
    config: RunConfig, ranks: ProcessGroup, folder: Path, task_configs: Sequence[TaskConfig], path: Path
) -> EndTaskScores:
    """Run every job (a task with a seed) that the file of scores lacks; returns all scores, on every rank.

    Rank r of W runs the open jobs r, r + W, ... The file is written after each round, so that an interruption loses at
    most one job per rank.

    Args:
        config: run config, for loading the model.
        ranks: the process group.
        folder: exported model.
        task_configs: tasks to score.
        path: file of scores.

    Raises:
        DasError: a task, model or file that cannot be used.
    """
    source = ModelConfig(
        name_or_path=str(folder), attention=config.model.attention, architecture=config.model.architecture
    )
    torch.set_float32_matmul_precision(config.train.matmul_precision)
    ranks.run_on_main(lambda: _check(source, folder))
    tasks = ranks.main_process_first(lambda: [read_task(task) for task in task_configs])
    if path.parent == config.output_dir / BASE_FOLDER:
        ranks.run_on_main(lambda: _make_folder(path.parent))
    scores = _load_scores(ranks, path, folder, tasks)
    jobs = [(task, seed) for task in tasks for seed in task.config.seeds if not scores.has(task.config.name, seed)]
    wandb_job = WandbJob(path.parent, JOB_TYPE, f"{path.resolve().parent.name} {JOB_TYPE}")
    tracker = ranks.run_on_main(lambda: build_job_tracker(config, wandb_job, enabled=bool(jobs))) or Tracker()
    with tracker:
        for first in range(0, len(jobs), ranks.info.world_size):
            round_jobs = jobs[first : first + ranks.info.world_size]
            scores = _run_round(ranks, round_jobs, scores, source, path)
            tracker.log_summary(mean_scores(scores))
        tracker.log_table("end_tasks", *build_score_table(scores))
    return scores


def _run_round(
    ranks: ProcessGroup, jobs: Sequence[tuple[EndTask, int]], scores: EndTaskScores, source: ModelConfig, path: Path
) -> EndTaskScores:
    """Run at most one job per rank; results are written even if the job of another rank failed."""
    result: SeedScores | None = None
    failure: DasError | None = None
    if ranks.info.rank < len(jobs):
        task, seed = jobs[ranks.info.rank]
        try:
            result = fine_tune(task, seed, source, ranks.info.device, show=ranks.info.is_main)
        except DasError as error:
            failure = error
    for (task, _), seed_scores in zip(jobs, ranks.all_gather_object(result), strict=False):
        if seed_scores is not None:
            scores = scores.with_seed(task, seed_scores)
    if scores.tasks:
        ranks.run_on_main(lambda: scores.write(path))
    ranks.raise_on_all_ranks(failure)
    return scores


def _check(source: ModelConfig, folder: Path) -> None:
    check_model_folder(folder)
    check_files(source)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"output_dir: cannot create {folder}: {error.strerror or error}") from error


def resolve_scores_path(config: RunConfig, folder: Path, output: Path | None) -> Path:
    """The file to write scores to: `output`, else in the run folder, next to the model.

    The scores of the model that the config's run starts from go to `<output_dir>/base/` (the score before training);
    those of a domain's model to `domains/<ii>_<name>/`.

    Raises:
        ConfigError: any other model, without `output`.
    """
    if output is not None:
        return output
    source = config.model.name_or_path
    if source is not None and Path(source).resolve() == folder.resolve():
        return config.output_dir / BASE_FOLDER / END_TASKS_FILE
    domain = folder.resolve().parent
    if domain.parent.name != "domains":
        raise ConfigError(
            f"--model {folder}: found neither a model of a run (domains/<ii>_<name>/model) nor the config's "
            "model.name_or_path; expected --output FILE with any other model"
        )
    return domain / END_TASKS_FILE


def _load_scores(ranks: ProcessGroup, path: Path, folder: Path, tasks: list[EndTask]) -> EndTaskScores:
    """The scores in the file; only rank 0 reads it, because other ranks may not see the run folder."""

    def load() -> EndTaskScores:
        scores = open_scores(path, _weights_checksum(folder), tasks)
        # The domain of a task may have changed in the config since it was scored.
        updated = scores.with_domains(tasks)
        if updated != scores:
            updated.write(path)
        return updated

    scores = ranks.all_gather_object(ranks.run_on_main(load))[0]
    assert scores is not None
    return scores


def _weights_checksum(folder: Path) -> str:
    """Checksum of all weight files of a model."""
    digests = "".join(checksum(path) for path in list_weight_files(folder))
    return hashlib.sha256(digests.encode()).hexdigest()
