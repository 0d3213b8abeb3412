"""Fine-tuning an exported model on the end tasks of a config: tasks x seeds, divided among the ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from das_ds.config import ModelConfig, RunConfig, TaskConfig
from das_ds.distributed.process_group import ProcessGroup
from das_ds.downstream.classifier import check_model_folder, weight_files
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
    config: RunConfig, ranks: ProcessGroup, folder: Path, chosen: Sequence[TaskConfig], path: Path
) -> EndTaskScores:
    """Do every job, a task with a seed, that the file of scores lacks; returns all scores on every rank.

    Rank r of W takes jobs r, r + W, ... of what is to be done. After each round the file is written, so that a start
    that was broken off costs one job per rank.

    Args:
        config: run config, for how the model is loaded.
        ranks: of this start.
        folder: exported model.
        chosen: tasks to do.
        path: file of scores.

    Raises:
        DasError: a task, model or file that cannot be used.
    """
    source = ModelConfig(
        name_or_path=str(folder), attention=config.model.attention, architecture=config.model.architecture
    )
    torch.set_float32_matmul_precision(config.train.matmul_precision)
    ranks.run_on_main(lambda: _check(source, folder))
    tasks = ranks.main_process_first(lambda: [read_task(task) for task in chosen])
    if path.parent == config.output_dir / BASE_FOLDER:
        ranks.run_on_main(lambda: _make(path.parent))
    scores = _from_main(ranks, path, folder, tasks)
    jobs = [(task, seed) for task in tasks for seed in task.config.seeds if not scores.has(task.config.name, seed)]
    wandb_job = WandbJob(path.parent, JOB_TYPE, f"{path.resolve().parent.name} {JOB_TYPE}")
    tracker = ranks.run_on_main(lambda: build_job_tracker(config, wandb_job, enabled=bool(jobs))) or Tracker()
    with tracker:
        for first in range(0, len(jobs), ranks.info.world_size):
            together = jobs[first : first + ranks.info.world_size]
            scores = _round(ranks, together, scores, source, path)
            tracker.log_summary(mean_scores(scores))
        tracker.log_table("end_tasks", *build_score_table(scores))
    return scores


def _round(
    ranks: ProcessGroup, jobs: Sequence[tuple[EndTask, int]], scores: EndTaskScores, source: ModelConfig, path: Path
) -> EndTaskScores:
    """One job for each rank, at most; what is done is written even where a job of another rank failed."""
    done: SeedScores | None = None
    failure: DasError | None = None
    if ranks.info.rank < len(jobs):
        task, seed = jobs[ranks.info.rank]
        try:
            done = fine_tune(task, seed, source, ranks.info.device, show=ranks.info.is_main)
        except DasError as error:
            failure = error
    for (task, _), found in zip(jobs, ranks.all_gather_object(done), strict=False):
        if found is not None:
            scores = scores.with_seed(task, found)
    if scores.tasks:
        ranks.run_on_main(lambda: scores.write(path))
    ranks.raise_on_all_ranks(failure)
    return scores


def _check(source: ModelConfig, folder: Path) -> None:
    check_model_folder(folder)
    check_files(source)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"output_dir: cannot make {folder}: {error.strerror or error}") from error


def resolve_scores_path(config: RunConfig, folder: Path, output: Path | None) -> Path:
    """Where scores are written: `output`, else in the run folder or beside the model of a run's domain.

    Those of the model that the config's run starts from are in `<output_dir>/base/`, the row before training of the
    run's scores; those of a domain's model in `domains/<ii>_<name>/`.

    Raises:
        ConfigError: the model is no such, and its scores may be wanted anywhere.
    """
    if output is not None:
        return output
    source = config.model.name_or_path
    if source is not None and Path(source).resolve() == folder.resolve():
        return config.output_dir / BASE_FOLDER / END_TASKS_FILE
    domain = folder.resolve().parent
    if domain.parent.name != "domains":
        raise ConfigError(
            f"--model {folder}: found no model of a run (domains/<ii>_<name>/model), beside which scores are written, "
            "nor the config's model.name_or_path; expected --output FILE with any other model"
        )
    return domain / END_TASKS_FILE


def _from_main(ranks: ProcessGroup, path: Path, folder: Path, tasks: list[EndTask]) -> EndTaskScores:
    """What the file of scores holds; rank 0 alone reads it, as only its folder need be the run's."""

    def opened() -> EndTaskScores:
        found = open_scores(path, _weights_checksum(folder), tasks)
        # A task may be found to belong to another domain when all is done already.
        named = found.with_domains(tasks)
        if named != found:
            named.write(path)
        return named

    scores = ranks.all_gather_object(ranks.run_on_main(opened))[0]
    assert scores is not None
    return scores


def _weights_checksum(folder: Path) -> str:
    """Checksum of the weights of a model, whole or in shards."""
    digests = "".join(checksum(path) for path in weight_files(folder))
    return hashlib.sha256(digests.encode()).hexdigest()
