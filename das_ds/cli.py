"""Entry points: parse, build, run, close; a user's error is one line and exit code 2, a stopped run exit code 75."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml

from das_ds import __version__
from das_ds.config import RunConfig
from das_ds.config.deepspeed import build_engine_config
from das_ds.config.help import describe_config, describe_method, describe_methods, describe_section
from das_ds.config.io import load_config, read_mapping, resolved_dict
from das_ds.errors import EXIT_STOPPED, EXIT_USER_ERROR, ConfigError, DasError, RunFolderError, StoppedError
from das_ds.run_dir import REPORT_FILE, REPORT_FOLDER, RESULTS_FILE, RunDir, holds_same_run

if TYPE_CHECKING:
    from das_ds.config import TaskConfig
    from das_ds.distributed.process_group import ProcessGroup

LEAST_START_TIMEOUT = timedelta(minutes=2)
"""Ranks import the same libraries at different speeds."""


def main(arguments: list[str] | None = None) -> int:
    """The `das-ds` command; `launch/*.py` call it with their command's name in front."""
    options = _parser().parse_args(arguments)
    try:
        if "config" in options:
            options.action(_load_config(options), options)
        else:
            options.action(options)
    except (DasError, StoppedError) as error:
        if _prints_errors():
            print(f"das_ds: {error}", file=sys.stderr)
        exit_code = EXIT_STOPPED if isinstance(error, StoppedError) else EXIT_USER_ERROR
        if "das_ds.distributed.process_group" in sys.modules:
            from das_ds.distributed.process_group import hard_exit

            hard_exit(exit_code)
        return exit_code
    return 0


def _load_config(options: argparse.Namespace) -> RunConfig:
    """The config that a command names: a file, or that of a run, of which another file may have more tasks.

    Raises:
        ConfigError: an invalid config.
        RunFolderError: a folder without a run, or a config of another run.
    """
    run: Path | None = options.run if "run" in options else None
    if run is None:
        if options.config is None:
            raise ConfigError("--config: found none with --model, expected the run config that has the tasks")
        return load_config(options.config, options.overrides)
    recorded = RunDir(run).config_file
    if not recorded.is_file():
        raise RunFolderError(f"--run {run}: found no {recorded.name} there, expected the folder of a run")
    config = load_config(options.config or recorded, options.overrides)
    if not config.tasks:
        raise ConfigError(
            f"tasks: found none in {options.config or recorded}, expected at least one with name, train, dev and test; "
            "--config FILE reads them from another config of the run"
        )
    # The folder may have been moved since it was recorded.
    config = config.model_copy(update={"output_dir": run})
    holds_same_run(config)
    return config


def _prints_errors() -> bool:
    """Whether this process prints errors that all ranks have: it is rank 0, or its rank is invalid."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    world_size = os.environ.get("WORLD_SIZE", "")
    if not rank.isdecimal() or int(rank) == 0:
        return True
    return world_size.isdecimal() and int(rank) >= int(world_size)


def _start_ranks(config: RunConfig) -> ProcessGroup:
    from das_ds.distributed.process_group import init_process_group

    hang_timeout = timedelta(seconds=config.runtime.hang_timeout)
    # Collectives wait far longer, so that the watchdog, which can name the stuck rank, ends the run first.
    return init_process_group(max(hang_timeout, LEAST_START_TIMEOUT), 2 * hang_timeout + LEAST_START_TIMEOUT)


def _train(config: RunConfig, _: argparse.Namespace) -> None:
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


def _evaluate(config: RunConfig, options: argparse.Namespace) -> None:
    from das_ds.training.evaluate import evaluate_model

    ranks = _start_ranks(config)
    losses = evaluate_model(config, ranks, options.model, in_bits_per_byte=options.bits_per_byte)
    ranks.close()
    if ranks.info.is_main:
        print(json.dumps(losses))


def _finetune(config: RunConfig, options: argparse.Namespace) -> None:
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


def _benchmark(config: RunConfig, options: argparse.Namespace) -> None:
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


def _tokenize(config: RunConfig, options: argparse.Namespace) -> None:
    from das_ds.reporting.tables import format_plain
    from das_ds.training.tokenize_corpora import tokenize_corpora

    print(format_plain(tokenize_corpora(config, options.processes)))


def _preflight(config: RunConfig, options: argparse.Namespace) -> None:
    from datetime import timedelta

    from das_ds.preflight.peers import PeerCheck
    from das_ds.preflight.run import run_preflight

    peers = PeerCheck(timedelta(seconds=config.runtime.hang_timeout))
    run_preflight(config, peers, as_json=options.json, estimates_time=options.time)
    peers.ranks.close()


def _plan(config: RunConfig, options: argparse.Namespace) -> None:
    from das_ds.preflight.plan_command import run_plan

    run_plan(config, options)


def _init(options: argparse.Namespace) -> None:
    from das_ds.new_config import write_new_config

    from_hub = write_new_config(options.output, options.model, options.domain, options.general, options.method)
    if from_hub:
        print(f"taken as hub data sets, as no such file or folder is here: {', '.join(from_hub)}")
    print(f"wrote {options.output}; next: das-ds preflight --config {options.output}")


def _slurm_init(options: argparse.Namespace) -> None:
    from das_ds.slurm.batch_files import write_batch_files

    written = write_batch_files(options.folder)
    train = shlex.quote(str(options.folder / "train.sbatch"))
    print(f"wrote {', '.join(map(str, written))}")
    print(f"next: sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 {train} --config run.yaml")


def _status(options: argparse.Namespace) -> None:
    from das_ds.training.status import read_status

    status = read_status(options.run)
    print(json.dumps(asdict(status)) if options.json else "\n".join(status.lines()))


def _report(options: argparse.Namespace) -> None:
    from das_ds.reporting.run import report_runs

    report_runs(options.runs, options.output, options.baseline, wandb=options.wandb)


def _check_config(config: RunConfig, _: argparse.Namespace) -> None:
    # A config that is invalid for one rank is invalid for any number.
    build_engine_config(config, world_size=1)
    print(yaml.safe_dump(resolved_dict(config), sort_keys=False), end="")


def _methods(options: argparse.Namespace) -> None:
    print(describe_methods() if options.name is None else describe_method(options.name))


def _inspect(options: argparse.Namespace) -> None:
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


class _CommandParser(argparse.ArgumentParser):
    """Parser whose help can end with the keys of the run config, which are only built for that."""

    lists_config_keys = False

    def format_help(self) -> str:
        """The help, with the keys where the command takes a config."""
        if self.lists_config_keys:
            self.epilog = describe_config()
        return super().format_help()


class _ConfigHelp(argparse.Action):
    """`--help` of a command that takes a config: everything, or with an argument the keys of one section."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        try:
            if values is None:
                parser.print_help()
            else:
                print(describe_section(values))
            sys.stdout.flush()
        except ConfigError as error:
            parser.exit(EXIT_USER_ERROR, f"das_ds: {error}\n")
        except BrokenPipeError:
            # A reader such as `head` has seen enough. Python flushes again when it exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit()


_Commands: TypeAlias = "argparse._SubParsersAction[_CommandParser]"


def _parser() -> argparse.ArgumentParser:
    parser = _CommandParser(prog="das-ds", description="Continual pre-training without forgetting.")
    parser.add_argument("--version", action="version", version=f"das_ds {__version__}")
    # The DeepSpeed launcher puts it first when it starts a module (`deepspeed --module das_ds train ...`).
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands: _Commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_config_command(commands, "train", _train, "run or resume a sequence of domains")
    _add_evaluate(commands)
    _add_finetune(commands)
    _add_benchmark(commands)
    _add_preflight(commands)
    _add_tokenize(commands)
    _add_plan(commands)
    _add_config_command(
        commands,
        "check-config",
        _check_config,
        "check a config and its DeepSpeed file without ranks, text or model, and print it with all defaults",
    )
    _add_init(commands)
    _add_slurm(commands)
    _add_status(commands)
    _add_report(commands)
    _add_methods(commands)
    _add_inspect(commands)
    return parser


def _add_config_command(
    commands: _Commands,
    name: str,
    action: Callable[[RunConfig, argparse.Namespace], None],
    text: str,
    *,
    requires_config: bool = True,
) -> _CommandParser:
    """A command that takes a run config and overrides."""
    command = commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    command.lists_config_keys = True
    text = "show this help; with a SECTION such as train, only its config keys"
    command.add_argument("-h", "--help", action=_ConfigHelp, nargs="?", metavar="SECTION", help=text)
    command.set_defaults(action=action)
    command.add_argument("--config", required=requires_config, type=Path, help="run config (YAML)")
    command.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="overrides of the config")
    # Passed by the DeepSpeed launcher; the environment variable LOCAL_RANK counts.
    command.add_argument("--local_rank", help=argparse.SUPPRESS)
    return command


def _add_evaluate(commands: _Commands) -> None:
    text = "print an exported model's held-out losses on the corpora of a config, as JSON"
    command = _add_config_command(commands, "evaluate", _evaluate, text)
    command.add_argument("--model", required=True, type=Path, help="folder of an exported model")
    text = "print bits per byte of text instead of nats per token; causal models only"
    command.add_argument("--bits-per-byte", action="store_true", help=text)


def _add_finetune(commands: _Commands) -> None:
    text = "fine-tune an exported model, or all models of a run, on the tasks of a config and record the scores"
    command = _add_config_command(commands, "finetune", _finetune, text, requires_config=False)
    models = command.add_mutually_exclusive_group(required=True)
    models.add_argument("--model", type=Path, help="folder of an exported model")
    text = "run folder: the model before training and all exports; --config may be left out"
    models.add_argument("--run", type=Path, help=text)
    text = "a task of the config, may be repeated; default: all"
    command.add_argument("--task", action="append", default=[], metavar="NAME", help=text)
    text = "file of scores to create or extend; default: end_tasks.json next to the model of a run, or in base/"
    command.add_argument("--output", type=Path, metavar="FILE", help=text)


def _add_benchmark(commands: _Commands) -> None:
    text = "score public benchmarks on a run's base model and exports, and put them into its report"
    command = _add_config_command(commands, "benchmark", _benchmark, text)
    text = "results of lm-evaluation-harness to record too, of STAGE (base, or a domain) or of the model that they name"
    command.add_argument("--results", action="append", default=[], metavar="[STAGE=]FILE", help=text)
    command.add_argument("--json", action="store_true", help="print the accuracies as one JSON object")


def _add_preflight(commands: _Commands) -> None:
    text = "check ranks, folders, disk, text, model and memory before a run; start it like train"
    command = _add_config_command(commands, "preflight", _preflight, text)
    command.add_argument("--json", action="store_true", help="print the findings as one JSON object")
    text = (
        "also tokenize all text, take a few steps and batches and two exports with the model of the run, and say how "
        "long the run will take"
    )
    command.add_argument("--time", action="store_true", help=text)


def _add_tokenize(commands: _Commands) -> None:
    text = (
        "tokenize all text of a run into the cache that training reads, before GPUs are taken; a start after an "
        "interruption continues, and several at once do not disturb each other"
    )
    command = _add_config_command(commands, "tokenize", _tokenize, text)
    text = "processes that tokenize; default: one for each CPU core"
    command.add_argument("--processes", type=int, default=_num_cores(), metavar="N", help=text)


def _num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _add_plan(commands: _Commands) -> None:
    text = "memory, traffic, time and cost of a run on GPUs that need not be there, from its config alone"
    command = _add_config_command(commands, "plan", _plan, text)
    text = "number of GPUs; default: a table over 1 to 512 GPUs and all ZeRO stages"
    command.add_argument("--gpus", type=int, metavar="N", help=text)
    command.add_argument("--gpu", metavar="NAME", help="data sheet, such as h100, a100, l40s; default: h100")
    command.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory of a GPU; default: of the data sheet")
    command.add_argument("--gpu-tflops", type=float, metavar="TFLOPS", help="peak of a GPU in the training precision")
    text = "share of the peak that plain training reaches, with all waiting and recomputation; default: 0.4"
    command.add_argument("--mfu", type=float, default=0.4, help=text)
    command.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    text = "GB/s that a GPU sends within its node; default: of the data sheet"
    command.add_argument("--link-bandwidth", type=float, metavar="GB/S", help=text)
    text = "GB/s that a GPU sends to other nodes; default: 50, 400 Gbit/s for each GPU"
    command.add_argument("--network-bandwidth", type=float, default=50.0, metavar="GB/S", help=text)
    text = "GB/s at which each rank that exports writes its files of a model; default: 1"
    command.add_argument("--disk-bandwidth", type=float, default=1.0, metavar="GB/S", help=text)
    command.add_argument("--host-memory", type=float, metavar="GIB", help="host memory of a node; default: not checked")
    command.add_argument("--price-per-gpu-hour", type=float, metavar="PRICE", help="in any currency; default: no cost")
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_init(commands: _Commands) -> None:
    text = "write a run config with comments for a model and folders of text"
    command = commands.add_parser("init", help=text, description=text)
    command.set_defaults(action=_init)
    command.add_argument("--model", required=True, help="model folder or hub name")
    text = "domains in the order of learning; PATH is a folder of text, a file, a glob or a hub data set"
    command.add_argument("--domain", required=True, nargs="+", action="extend", metavar="NAME=PATH", help=text)
    command.add_argument("--general", metavar="PATH", help="general text, which is only evaluated; default: none")
    command.add_argument("--method", metavar="NAME", help="see `das-ds methods`; default: the one to try first")
    text = "file to write, which must not exist; default: run.yaml"
    command.add_argument("--output", type=Path, default=Path("run.yaml"), metavar="FILE", help=text)


def _add_slurm(commands: _Commands) -> None:
    text = "write SLURM batch files that save, requeue and resume runs"
    command = commands.add_parser("slurm", help=text, description=text)
    actions: _Commands = command.add_subparsers(metavar="COMMAND", required=True)
    text = "write the batch files train, train_deepspeed and sweep for the environment of this command"
    init = actions.add_parser("init", help=text, description=text)
    init.set_defaults(action=_slurm_init)
    text = "folder to write to, which must not have such files; default: slurm"
    init.add_argument("folder", nargs="?", type=Path, default=Path("slurm"), metavar="DIR", help=text)


def _add_status(commands: _Commands) -> None:
    text = "print where a run is, from the files in its folder: phase, step, time left, losses, newest checkpoint"
    command = commands.add_parser("status", help=text, description=text)
    command.set_defaults(action=_status)
    command.add_argument("run", type=Path, metavar="RUN", help="run folder")
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _add_report(commands: _Commands) -> None:
    text = "compare runs: tables, pictures and comparison.json, with intervals over seeds"
    command = commands.add_parser("report", help=text, description=text)
    command.set_defaults(action=_report)
    text = "run folder; runs that differ only in their seed are one group, as are those with the same LABEL"
    command.add_argument("runs", nargs="*", metavar="[LABEL=]RUN", help=text)
    text = "folder to write to; default: comparison"
    command.add_argument("--output", type=Path, default=Path("comparison"), metavar="DIR", help=text)
    text = "group that all others are compared with; default: the group of the first run"
    command.add_argument("--baseline", metavar="LABEL", help=text)
    command.add_argument("--wandb", action="store_true", help="also log tables and plots to W&B (job type report)")


def _add_methods(commands: _Commands) -> None:
    text = "print all continual-learning methods, or the config keys of one"
    command = commands.add_parser("methods", help=text, description=text)
    command.set_defaults(action=_methods)
    command.add_argument("name", nargs="?", metavar="NAME", help="name of a method; default: list all")


def _add_inspect(commands: _Commands) -> None:
    text = "print a model's table of units: registered, or proposed and tested on a small network with random weights"
    command = commands.add_parser("inspect", help=text, description=text)
    command.set_defaults(action=_inspect)
    command.add_argument("model", metavar="MODEL", help="model folder, hub name, or model config file (.yaml, .json)")
    text = "objective of a proposal; default: that of the architecture"
    command.add_argument("--objective", choices=("mlm", "clm"), help=text)
    command.add_argument("--yaml", action="store_true", help="print the table as model.architecture of a run config")


if __name__ == "__main__":
    sys.exit(main())
