"""The commands, their options and their help."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from das_ds import __version__
from das_ds.commands import (
    benchmark_command,
    check_config_command,
    evaluate_command,
    finetune_command,
    init_command,
    inspect_command,
    methods_command,
    plan_command,
    preflight_command,
    report_command,
    slurm_init_command,
    status_command,
    tokenize_command,
    train_command,
)
from das_ds.config import RunConfig
from das_ds.config.help import describe_config, describe_section
from das_ds.errors import EXIT_USER_ERROR, ConfigError


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


def command_parser() -> argparse.ArgumentParser:
    """Parser of all commands; a parsed command has what it does as `action`."""
    parser = _CommandParser(prog="das-ds", description="Continual pre-training without forgetting.")
    parser.add_argument("--version", action="version", version=f"das_ds {__version__}")
    # The DeepSpeed launcher puts it first when it starts a module (`deepspeed --module das_ds train ...`).
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands: _Commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_config_command(commands, "train", train_command, "run or resume a sequence of domains")
    _add_evaluate(commands)
    _add_finetune(commands)
    _add_benchmark(commands)
    _add_preflight(commands)
    _add_tokenize(commands)
    _add_plan(commands)
    _add_config_command(
        commands,
        "check-config",
        check_config_command,
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
    command = _add_config_command(commands, "evaluate", evaluate_command, text)
    command.add_argument("--model", required=True, type=Path, help="folder of an exported model")
    text = "print bits per byte of text instead of nats per token; causal models only"
    command.add_argument("--bits-per-byte", action="store_true", help=text)


def _add_finetune(commands: _Commands) -> None:
    text = "fine-tune an exported model, or all models of a run, on the tasks of a config and record the scores"
    command = _add_config_command(commands, "finetune", finetune_command, text, requires_config=False)
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
    command = _add_config_command(commands, "benchmark", benchmark_command, text)
    text = "results of lm-evaluation-harness to record too, of STAGE (base, or a domain) or of the model that they name"
    command.add_argument("--results", action="append", default=[], metavar="[STAGE=]FILE", help=text)
    command.add_argument("--json", action="store_true", help="print the accuracies as one JSON object")


def _add_preflight(commands: _Commands) -> None:
    text = "check ranks, folders, disk, text, model and memory before a run; start it like train"
    command = _add_config_command(commands, "preflight", preflight_command, text)
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
    command = _add_config_command(commands, "tokenize", tokenize_command, text)
    text = "processes that tokenize; default: one for each CPU core"
    command.add_argument("--processes", type=int, default=_num_cores(), metavar="N", help=text)


def _num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _add_plan(commands: _Commands) -> None:
    text = "memory, traffic, time and cost of a run on GPUs that need not be there, from its config alone"
    command = _add_config_command(commands, "plan", plan_command, text)
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
    command.set_defaults(action=init_command)
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
    init.set_defaults(action=slurm_init_command)
    text = "folder to write to, which must not have such files; default: slurm"
    init.add_argument("folder", nargs="?", type=Path, default=Path("slurm"), metavar="DIR", help=text)


def _add_status(commands: _Commands) -> None:
    text = "print where a run is, from the files in its folder: phase, step, time left, losses, newest checkpoint"
    command = commands.add_parser("status", help=text, description=text)
    command.set_defaults(action=status_command)
    command.add_argument("run", type=Path, metavar="RUN", help="run folder")
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _add_report(commands: _Commands) -> None:
    text = "compare runs: tables, pictures and comparison.json, with intervals over seeds"
    command = commands.add_parser("report", help=text, description=text)
    command.set_defaults(action=report_command)
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
    command.set_defaults(action=methods_command)
    command.add_argument("name", nargs="?", metavar="NAME", help="name of a method; default: list all")


def _add_inspect(commands: _Commands) -> None:
    text = "print a model's table of units: registered, or proposed and tested on a small network with random weights"
    command = commands.add_parser("inspect", help=text, description=text)
    command.set_defaults(action=inspect_command)
    command.add_argument("model", metavar="MODEL", help="model folder, hub name, or model config file (.yaml, .json)")
    text = "objective of a proposal; default: that of the architecture"
    command.add_argument("--objective", choices=("mlm", "clm"), help=text)
    command.add_argument("--yaml", action="store_true", help="print the table as model.architecture of a run config")
