"""`das-ds train` on real ranks, each a process with an exit code."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from das_ds.cli import main
from das_ds.config import RunConfig
from das_ds.config_io import resolved_dict
from helpers.run_ranks import start_ranks

PATIENCE_S = 120.0


def start_training(values: dict[str, Any], folder: Path, world_size: int) -> list[Any]:
    """Processes of `das-ds train` over this config."""
    path = folder / "config_of_run.yaml"
    path.write_text(yaml.safe_dump(resolved_dict(RunConfig(**values))), encoding="utf-8")
    return start_ranks(_train, world_size, str(path))


def exit_codes(processes: list[Any]) -> list[int]:
    """Exit codes of all, waited for; none is left behind."""
    try:
        for process in processes:
            process.join(PATIENCE_S)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def wait_until(is_true: Callable[[], bool], what: str) -> None:
    """Returns as soon as it is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < deadline, f"time ran out; {what} never happened"
        time.sleep(0.02)


def _train(config: str) -> None:
    sys.exit(main(["train", "--config", config]))
