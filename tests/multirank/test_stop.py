"""A run that is asked to stop or to save, by signal or file, and what its processes say as they end."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from helpers.command_runs import exit_codes, start_training, wait_until
from helpers.resume import assert_same_run
from helpers.runs import small_run

pytestmark = pytest.mark.multirank


def run(folder: Path, name: str, **checkpoint: Any) -> dict[str, Any]:
    base = small_run(folder)
    train = {**base["train"], "micro_batch_size": 2, "steps_per_domain": 40, "log_every": 1}
    return {
        **base,
        "output_dir": folder / name,
        "train": train,
        "method": {"name": "das", "importance": {"samples": 10}},
        "checkpoint": {"every_steps": 1000, **checkpoint},
    }


def num_lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name[0] != ".")


def test_a_stopped_run_ends_with_75_and_continues_to_the_same_end(tmp_path: Path) -> None:
    whole, stopped = run(tmp_path, "whole"), run(tmp_path, "stopped")
    assert exit_codes(start_training(whole, tmp_path, 2)) == [0, 0]
    folder = tmp_path / "stopped"

    processes = start_training(stopped, tmp_path, 2)
    wait_until(lambda: num_lines(folder) >= 3, "the third step")
    os.kill(processes[1].pid, signal.SIGUSR2)
    assert exit_codes(processes) == [75, 75]
    assert "_food_train_" in checkpoints(folder)[-1]

    seen = num_lines(folder)
    processes = start_training(stopped, tmp_path, 2)
    wait_until(lambda: num_lines(folder) > seen, "a step after the stop")
    (folder / "STOP").touch()
    assert exit_codes(processes) == [75, 75]
    assert not (folder / "STOP").exists()

    assert exit_codes(start_training(stopped, tmp_path, 2)) == [0, 0]
    assert_same_run(folder, tmp_path / "whole")
    # Once more: there is nothing left to do, and nothing changes.
    assert exit_codes(start_training(stopped, tmp_path, 2)) == [0, 0]
    assert_same_run(folder, tmp_path / "whole")


def test_the_file_save_saves_once_and_the_run_goes_on(tmp_path: Path) -> None:
    values, folder = run(tmp_path, "run", keep=100), tmp_path / "run"
    processes = start_training(values, tmp_path, 2)
    wait_until(lambda: num_lines(folder) >= 2, "the second step")
    (folder / "SAVE").touch()
    assert exit_codes(processes) == [0, 0]
    assert not (folder / "SAVE").exists()
    within = [name for name in checkpoints(folder) if "_train_" in name and not name.endswith("_train_0")]
    assert len(within) == 1


def test_a_stop_before_training_loses_nothing(tmp_path: Path) -> None:
    values, folder = run(tmp_path, "run"), tmp_path / "run"
    processes = start_training(values, tmp_path, 2)
    wait_until((folder / "config.yaml").exists, "the run folder")
    (folder / "STOP").touch()
    assert exit_codes(processes) == [75, 75]
    assert exit_codes(start_training(values, tmp_path, 2)) == [0, 0]
