"""What each command does. Libraries that take seconds to import are imported by the commands that use them."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from das_ds.config import RunConfig
from das_ds.config.deepspeed import build_engine_config
from das_ds.config.help import describe_method, describe_methods
from das_ds.config.io import read_mapping, resolved_dict
from das_ds.errors import ConfigError
from das_ds.run_dir import REPORT_FILE, REPORT_FOLDER, RESULTS_FILE

if TYPE_CHECKING:
    from das_ds.config import TaskConfig
    from das_ds.distributed.process_group import ProcessGroup

LEAST_START_TIMEOUT = timedelta(minutes=2)
"""Ranks import the same libraries at different speeds."""


def _start_ranks(config: RunConfig) -> ProcessGroup:
    from das_ds.distributed.process_group import init_process_group

    hang_timeout = timedelta(seconds=config.runtime.hang_timeout)
    # Collectives wait far longer, so that the watchdog, which can name the stuck rank, ends the run first.
    return init_process_group(max(hang_timeout, LEAST_START_TIMEOUT), 2 * hang_timeout + LEAST_START_TIMEOUT)


def train_command(config: RunConfig, _: argparse.Namespace) -> None:
    """Train, or resume, a run."""
    # Importing the engine takes seconds, which --help and check-config need not pay for.
    from das_ds.distributed.process_group import hard_exit
    from das_ds.fault_tolerance.watchdog import EXIT_HANG, PeerLostError
    from das_ds.training.train import train

    ranks = _start_ranks(config)
    try:
        results = train(config, ranks)
    except PeerLostError as error:
        # Every rank prints it: rank 0 may be the lost one.
        print(f"das_ds: {error}", file=sys.stderr)
        hard_exit(EXIT_HANG)
        raise
    # Only after success: a rank that failed alone would wait here for peers that wait for it.
    ranks.close()
    if ranks.info.is_main:
        state = "complete" if results.complete else "incomplete"
        print(f"run {state}: {config.output_dir / RESULTS_FILE}, {config.output_dir / REPORT_FOLDER / REPORT_FILE}")


def evaluate_command(config: RunConfig, options: argparse.Namespace) -> None:
    """Print a model's held-out losses."""
    from das_ds.training.evaluate import evaluate_model

    ranks = _start_ranks(config)
    losses = evaluate_model(config, ranks, options.model, in_bits_per_byte=options.bits_per_byte)
    ranks.close()
    if ranks.info.is_main:
        print(json.dumps(losses))


def finetune_command(config: RunConfig, options: argparse.Namespace) -> None:
    """Fine-tune a model, or all models of a run, on end tasks."""
    from transformers.utils import logging

    from das_ds.downstream.run import finetune_model, resolve_scores_path
    from das_ds.downstream.scores import summarize_scores
    from das_ds.downstream.tasks import select_tasks
    from das_ds.reporting.run_report import refresh_report

    tasks = select_tasks(config.tasks, options.task)
    if options.run is not None:
        _finetune_run(config, options, tasks)
        return
    path = resolve_scores_path(config, options.model, options.output)
    # The head of a classifier is new by nature; transformers would report it for every job.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    ranks = _start_ranks(config)
    scores = finetune_model(config, ranks, options.model, tasks, path)
    ranks.close()
    if ranks.info.is_main:
        # The scores of a run are in base/ or domains/<ii>_<name>/ of its folder.
        for folder in path.resolve().parents[1:3]:
            refresh_report(folder)
        print(json.dumps(summarize_scores(scores, tasks)))


def _finetune_run(config: RunConfig, options: argparse.Namespace, tasks: list[TaskConfig]) -> None:
    from transformers.utils import logging

    from das_ds.downstream.run import finetune_models, list_scored_models
    from das_ds.downstream.scores import summarize_scores
    from das_ds.reporting.run_report import refresh_report
    from das_ds.training.revisions import with_recorded_revisions

    if options.output is not None:
        raise ConfigError(
            f"--output: found {options.output} with --run, whose scores are next to each model; expected none"
        )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    ranks = _start_ranks(config)
    config = with_recorded_revisions(config)
    models = list_scored_models(config, ranks)
    # After each model, so that an interruption loses nothing of the report.
    scores = finetune_models(config, ranks, models, tasks, lambda: refresh_report(config.output_dir))
    ranks.close()
    if ranks.info.is_main:
        by_stage = {model.stage: summarize_scores(found, tasks) for model, found in zip(models, scores, strict=True)}
        print(json.dumps(by_stage))


def benchmark_command(config: RunConfig, options: argparse.Namespace) -> None:
    """Score public benchmarks on the models of a run."""
    from das_ds.benchmark.harness_results import import_results
    from das_ds.benchmark.models import list_models
    from das_ds.benchmark.run import run_benchmarks
    from das_ds.progress import disable_library_bars
    from das_ds.reporting.benchmark_report import accuracy_rows, update_report
    from das_ds.reporting.run_report import refresh_report
    from das_ds.reporting.tables import format_plain
    from das_ds.training.revisions import with_recorded_revisions

    disable_library_bars()
    ranks = _start_ranks(config)
    config = with_recorded_revisions(config)
    ranks.run_on_main(lambda: import_results(config, list_models(config), options.results))
    # Results of another program need no tasks of one's own.
    if config.benchmarks.tasks or not options.results:
        run_benchmarks(config, ranks)
    matrix = ranks.run_on_main(lambda: update_report(config.output_dir))
    ranks.close()
    if matrix is not None:
        if ranks.info.is_main:
            refresh_report(config.output_dir)
        print(json.dumps(matrix.summary) if options.json else format_plain(accuracy_rows(matrix), text_columns=(0, 1)))


def tokenize_command(config: RunConfig, options: argparse.Namespace) -> None:
    """Tokenize all text of a run."""
    from das_ds.reporting.tables import format_plain
    from das_ds.training.tokenize_corpora import tokenize_corpora

    print(format_plain(tokenize_corpora(config, options.processes)))


def preflight_command(config: RunConfig, options: argparse.Namespace) -> None:
    """Check everything that a run needs."""
    from das_ds.preflight.peers import PeerCheck
    from das_ds.preflight.run import run_preflight

    peers = PeerCheck(timedelta(seconds=config.runtime.hang_timeout))
    run_preflight(config, peers, as_json=options.json, estimates_time=options.time)
    peers.ranks.close()


def plan_command(config: RunConfig, options: argparse.Namespace) -> None:
    """Print memory, traffic, time and cost of a run on GPUs that need not be there."""
    from das_ds.preflight.plan_command import run_plan

    run_plan(config, options)


def init_command(options: argparse.Namespace) -> None:
    """Write a run config."""
    from das_ds.new_config import write_new_config

    from_hub = write_new_config(options.output, options.model, options.domain, options.general, options.method)
    if from_hub:
        print(f"taken as hub data sets, as no such file or folder is here: {', '.join(from_hub)}")
    print(f"wrote {options.output}; next: das-ds preflight --config {options.output}")


def slurm_init_command(options: argparse.Namespace) -> None:
    """Write SLURM batch files."""
    from das_ds.slurm.batch_files import write_batch_files

    written = write_batch_files(options.folder)
    train = shlex.quote(str(options.folder / "train.sbatch"))
    print(f"wrote {', '.join(map(str, written))}")
    print(f"next: sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 {train} --config run.yaml")


def status_command(options: argparse.Namespace) -> None:
    """Print where a run is."""
    from das_ds.training.status import read_status

    status = read_status(options.run)
    print(json.dumps(asdict(status)) if options.json else "\n".join(status.lines()))


def report_command(options: argparse.Namespace) -> None:
    """Compare runs."""
    from das_ds.reporting.run import report_runs

    report_runs(options.runs, options.output, options.baseline, wandb=options.wandb)


def check_config_command(config: RunConfig, _: argparse.Namespace) -> None:
    """Print a config with all defaults."""
    # A config that is invalid for one rank is invalid for any number.
    build_engine_config(config, world_size=1)
    print(yaml.safe_dump(resolved_dict(config), sort_keys=False), end="")


def methods_command(options: argparse.Namespace) -> None:
    """Print all methods, or the keys of one."""
    print(describe_methods() if options.name is None else describe_method(options.name))


def inspect_command(options: argparse.Namespace) -> None:
    """Print a model's table of units."""
    # transformers logs missing weights while it builds networks; only the table is printed.
    from transformers.utils import logging

    from das_ds.config import ModelConfig
    from das_ds.models.inspect.describe import inspect_model
    from das_ds.models.loading import model_config

    logging.set_verbosity_error()
    if Path(options.model).suffix in (".yaml", ".yml", ".json"):
        values = read_mapping(Path(options.model), "a model config in YAML or JSON", "a mapping with model_type")
        try:
            source = ModelConfig(config=values)
        except ValueError:
            raise ConfigError(
                f"{options.model}: found no model_type, expected a Hugging Face model config with one"
            ) from None
    else:
        source = ModelConfig(name_or_path=options.model)
    table = inspect_model(model_config(source), options.objective)
    if not options.yaml:
        print(table.describe())
    table.check()
    if options.yaml:
        print(table.section(), end="")
