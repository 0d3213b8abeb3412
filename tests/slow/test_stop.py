"""Ends of the processes of a run that is asked to stop or save, or whose rank, disk or network fails."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from helpers.command_runs import (
    exit_codes,
    fill_disk_in_step_three,
    hang_in_step_three_of_rank_one,
    start_training,
    take_half_a_second_per_step,
    wait_until,
)
from helpers.resume import assert_same_run
from helpers.runs import small_run

pytestmark = pytest.mark.multirank


def run(folder: Path, name: str, method: str = "ncl", **checkpoint: Any) -> dict[str, Any]:
    base = small_run(folder)
    train = {**base["train"], "micro_batch_size": 2, "steps_per_domain": 40, "log_interval": 1}
    return {
        **base,
        "output_dir": folder / name,
        "train": train,
        "method": {"name": method, "importance": {"num_samples": 10}} if method == "das" else {"name": method},
        "checkpoint": {"interval": 1000, **checkpoint},
    }


def num_lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name[0] != ".")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `ncl` from beginning to end."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert exit_codes(start_training(run(folder, "complete"), folder, 2)) == [0, 0]
    return folder / "complete"


def test_stopped_run_exits_75_and_resumes_to_same_result(tmp_path: Path) -> None:
    complete, stopped = (run(tmp_path, name, "das") for name in ("complete", "stopped"))
    assert exit_codes(start_training(complete, tmp_path, 2)) == [0, 0]
    folder = tmp_path / "stopped"

    processes = start_training(stopped, tmp_path, 2, take_half_a_second_per_step)
    wait_until(lambda: num_lines(folder) >= 3, "the third step")
    os.kill(processes[1].pid, signal.SIGUSR2)
    assert exit_codes(processes) == [75, 75]
    assert "_food_train_" in checkpoints(folder)[-1]

    seen = num_lines(folder)
    processes = start_training(stopped, tmp_path, 2, take_half_a_second_per_step)
    wait_until(lambda: num_lines(folder) > seen, "a step after the stop")
    (folder / "STOP").touch()
    assert exit_codes(processes) == [75, 75]
    assert not (folder / "STOP").exists()

    assert exit_codes(start_training(stopped, tmp_path, 2)) == [0, 0]
    assert_same_run(folder, tmp_path / "complete")
    # Again: there is nothing left to do, and nothing changes.
    assert exit_codes(start_training(stopped, tmp_path, 2)) == [0, 0]
    assert_same_run(folder, tmp_path / "complete")


def test_save_file_saves_once_and_run_continues(tmp_path: Path) -> None:
    values = run(tmp_path, "run", keep_last=100)
    folder = tmp_path / "run"
    processes = start_training(values, tmp_path, 2)
    wait_until(lambda: num_lines(folder) >= 2, "the second step")
    (folder / "SAVE").touch()
    assert exit_codes(processes) == [0, 0]
    assert not (folder / "SAVE").exists()
    within = [name for name in checkpoints(folder) if "_train_" in name and not name.endswith("_train_0")]
    assert len(within) == 1


def test_stop_before_training_loses_nothing(tmp_path: Path) -> None:
    values = run(tmp_path, "run")
    folder = tmp_path / "run"
    processes = start_training(values, tmp_path, 2)
    wait_until((folder / "config.yaml").exists, "the run folder")
    (folder / "STOP").touch()
    assert exit_codes(processes) == [75, 75]
    assert exit_codes(start_training(values, tmp_path, 2)) == [0, 0]


def test_killed_rank_is_named_and_run_resumes(uninterrupted: Path, tmp_path: Path) -> None:
    killed = run(tmp_path, "killed", interval=5)
    processes = start_training(killed, tmp_path, 2, take_half_a_second_per_step)
    # Signs of life come once a second, and are read as often.
    wait_until(lambda: num_lines(tmp_path / "killed") >= 12, "step 12")
    os.kill(processes[1].pid, signal.SIGKILL)
    assert exit_codes(processes) == [1, -signal.SIGKILL]
    said = (tmp_path / "stderr_0").read_text()
    assert re.search(r"das_ds: rank 1 \(pid .*\) is gone; last heartbeat: step \d+ of food, \w+", said)
    assert exit_codes(start_training(killed, tmp_path, 2)) == [0, 0]
    assert_same_run(tmp_path / "killed", uninterrupted)


def test_hung_rank_is_named_by_all(tmp_path: Path) -> None:
    values = {**run(tmp_path, "run"), "runtime": {"hang_timeout": 4.0}}
    assert exit_codes(start_training(values, tmp_path, 2, hang_in_step_three_of_rank_one)) == [1, 1]
    for rank in (0, 1):
        said = (tmp_path / f"stderr_{rank}").read_text()
        assert re.search(
            r"das_ds: rank 1 \(pid .*\) has made no progress for \d+ s; current location: .*step \d of food", said
        )
        assert "command_runs.py" in (tmp_path / "run" / "hang-rank1.txt").read_text()


def test_full_disk_ends_run_with_previous_checkpoint(uninterrupted: Path, tmp_path: Path) -> None:
    full = run(tmp_path, "full", interval=4)
    assert exit_codes(start_training(full, tmp_path, 2, fill_disk_in_step_three)) == [2, 2]
    assert re.search(
        r"das_ds: .*000\d+_food_train_4: the checkpoint cannot be written", (tmp_path / "stderr_0").read_text()
    )
    assert checkpoints(tmp_path / "full")[-1].endswith("_food_train_0")
    assert exit_codes(start_training(full, tmp_path, 2)) == [0, 0]
    assert_same_run(tmp_path / "full", uninterrupted)
