"""Entry points: parse, run a command, close; a user's error is one line and exit code 2, a stopped run exit code 75."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from das_ds.command_parser import command_parser
from das_ds.config import RunConfig
from das_ds.config.io import load_config
from das_ds.errors import EXIT_STOPPED, EXIT_USER_ERROR, ConfigError, DasError, RunFolderError, StoppedError
from das_ds.run_dir import RunDir, holds_same_run


def main(arguments: list[str] | None = None) -> int:
    """The `das-ds` command; `launch/*.py` call it with their command's name in front."""
    options = command_parser().parse_args(arguments)
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


if __name__ == "__main__":
    sys.exit(main())
