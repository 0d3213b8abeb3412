"""Fine-tunes exported models on the end tasks of a config: all tasks and seeds, distributed over the ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from das_ds.config import ModelConfig, RunConfig, TaskConfig
from das_ds.distributed.process_group import ProcessGroup
from das_ds.downstream.classifier import check_model_folder
from das_ds.downstream.finetune import fine_tune
from das_ds.downstream.scores import EndTaskScores, SeedScores, build_score_table, mean_scores, open_scores
from das_ds.downstream.tasks import EndTask, read_task
from das_ds.errors import ConfigError, DasError, ModelError, RunFolderError
from das_ds.hub import HubError, resolve_model_folder
from das_ds.models.loading import check_files, weights_folder
from das_ds.models.run_models import list_run_models, list_weight_files, say_which_are_missing
from das_ds.progress import say
from das_ds.run_dir import BASE_FOLDER, END_TASKS_FILE
from das_ds.storage import checksum
from das_ds.tracking.tracker import Tracker, build_job_tracker
from das_ds.tracking.wandb_sink import WandbJob

JOB_TYPE = "finetune"


@dataclass(frozen=True)
class ScoredModel:
    """A model to fine-tune."""

    folder: Path
    """Of the model."""
    path: Path
    """File of its scores."""
    stage: str = ""
    """The stage of its run, as in `RunModel`; "" where it is fine-tuned alone."""
    tokenizer_folder: str | None = None
    """Where its tokenizer is; None: with the model."""


def finetune_model(
    config: RunConfig, ranks: ProcessGroup, folder: Path, task_configs: Sequence[TaskConfig], path: Path
) -> EndTaskScores:
    """Run every job (a task with a seed) that the file of scores lacks; returns all scores, on every rank.

    Args:
        config: run config, for loading the model.
        ranks: the process group.
        folder: exported model.
        task_configs: tasks to score.
        path: file of scores.

    Raises:
        DasError: a task, model or file that cannot be used.
    """
    return finetune_models(config, ranks, [ScoredModel(folder, path)], task_configs)[0]


def finetune_models(
    config: RunConfig,
    ranks: ProcessGroup,
    models: Sequence[ScoredModel],
    task_configs: Sequence[TaskConfig],
    on_model_end: Callable[[], None] = lambda: None,
) -> list[EndTaskScores]:
    """Run every job (a task with a seed) that the files of scores lack; returns all scores, on every rank.

    Rank r of W runs the open jobs r, r + W, ... of a model. A file is written after each round, so that an interruption
    loses at most one job per rank. All files are read first: what cannot be used is said before hours of work.

    Args:
        config: run config, for loading models.
        ranks: the process group.
        models: in the order of work.
        task_configs: tasks to score.
        on_model_end: called on rank 0 when a model has all its scores.

    Raises:
        DasError: a task, model or file that cannot be used.
    """
    torch.set_float32_matmul_precision(config.train.matmul_precision)
    sources = [
        ModelConfig(
            name_or_path=str(model.folder), attention=config.model.attention, architecture=config.model.architecture
        )
        for model in models
    ]
    for model, source in zip(models, sources, strict=True):
        ranks.run_on_main(partial(_check, source, model.folder))
    tasks = ranks.main_process_first(lambda: [read_task(task) for task in task_configs])
    recorded = []
    for model in models:
        if model.path.parent == config.output_dir / BASE_FOLDER:
            ranks.run_on_main(partial(_make_folder, model.path.parent))
        recorded.append(_load_scores(ranks, model.path, model.folder, tasks))
    completed = []
    for model, source, scores in zip(models, sources, recorded, strict=True):
        completed.append(_complete(config, ranks, model, source, tasks, scores))
        ranks.run_on_main(on_model_end)
    return completed


def list_scored_models(config: RunConfig, ranks: ProcessGroup) -> list[ScoredModel]:
    """The models of a run that can be fine-tuned: the one it starts from if its files are there, and all exports.

    Raises:
        RunFolderError: there is none.
    """
    models = []
    # Rank 0 decides, because other ranks may not see a model that has just been exported.
    listed = ranks.all_gather_object(list_run_models(config, END_TASKS_FILE))[0]
    if ranks.info.is_main:
        say_which_are_missing(config, listed)
    for model in listed:
        if not model.is_base:
            models.append(ScoredModel(Path(str(model.source.name_or_path)), model.scores_path, model.stage))
        elif model.source.name_or_path is not None:
            try:
                folder, tokenizer = ranks.main_process_first(partial(_find_base, config))
            except ModelError as error:
                if ranks.info.is_main:
                    say(f"the model before training is left out: {error}")
                continue
            models.append(ScoredModel(folder, model.scores_path, model.stage, tokenizer))
    if not models:
        raise RunFolderError(
            f"--run {config.output_dir}: found no exported model, expected at least one (domains/<ii>_<name>/model)"
        )
    return models


def _find_base(config: RunConfig) -> tuple[Path, str | None]:
    """Folder of the model that a run starts from, and of its tokenizer where that is another one; may download them.

    Raises:
        ModelError: they are not there.
    """
    folder = weights_folder(config.model)
    assert folder is not None, "a model with files"
    check_model_folder(Path(folder))
    if config.data.tokenizer is None:
        return Path(folder), None
    try:
        return Path(folder), resolve_model_folder(config.data.tokenizer, config.data.tokenizer_revision)
    except HubError as error:
        raise ModelError(f"cannot load the tokenizer {config.data.tokenizer!r}: {error}") from error


def _complete(
    config: RunConfig,
    ranks: ProcessGroup,
    model: ScoredModel,
    source: ModelConfig,
    tasks: Sequence[EndTask],
    scores: EndTaskScores,
) -> EndTaskScores:
    """The scores of a model, completed."""
    jobs = [(task, seed) for task in tasks for seed in task.config.seeds if not scores.has(task.config.name, seed)]
    if model.stage and jobs and ranks.info.is_main:
        say(f"{model.stage}: {len(jobs)} jobs of {sum(len(task.config.seeds) for task in tasks)} are open")
    wandb_job = WandbJob(model.path.parent, JOB_TYPE, f"{model.path.resolve().parent.name} {JOB_TYPE}")
    tracker = ranks.run_on_main(lambda: build_job_tracker(config, wandb_job, enabled=bool(jobs))) or Tracker()
    with tracker:
        for first in range(0, len(jobs), ranks.info.world_size):
            round_jobs = jobs[first : first + ranks.info.world_size]
            scores = _run_round(ranks, round_jobs, scores, source, model)
            tracker.log_summary(mean_scores(scores))
        tracker.log_table("end_tasks", *build_score_table(scores))
    return scores


def _run_round(
    ranks: ProcessGroup,
    jobs: Sequence[tuple[EndTask, int]],
    scores: EndTaskScores,
    source: ModelConfig,
    model: ScoredModel,
) -> EndTaskScores:
    """Run at most one job per rank; results are written even if the job of another rank failed."""
    result: SeedScores | None = None
    failure: DasError | None = None
    if ranks.info.rank < len(jobs):
        task, seed = jobs[ranks.info.rank]
        try:
            result = fine_tune(
                task,
                seed,
                source,
                ranks.info.device,
                tokenizer_folder=model.tokenizer_folder,
                show=ranks.info.is_main,
            )
        except DasError as error:
            failure = error
    for (task, _), seed_scores in zip(jobs, ranks.all_gather_object(result), strict=False):
        if seed_scores is not None:
            scores = scores.with_seed(task, seed_scores)
    if scores.tasks:
        ranks.run_on_main(lambda: scores.write(model.path))
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
