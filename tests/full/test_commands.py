"""The commands under other launchers, and their results."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from helpers.commands import command, on_two_ranks, program, write_config
from helpers.runs import small_run

pytestmark = pytest.mark.multirank


def test_deepspeed_launcher_passes_on_exit_code_2_and_one_line(tmp_path: Path) -> None:
    values = small_run(tmp_path)
    values["domains"][1]["train"] = [str(tmp_path / "no_such_file.txt")]
    path = write_config(tmp_path, values)
    done = on_two_ranks("launch/train.py", "--config", path)
    assert done.returncode == 2, done.stderr
    ours = [line for line in done.stderr.splitlines() if line.startswith("das_ds: ")]
    assert len(ours) == 1 and "no_such_file.txt" in ours[0] and "papers" in ours[0]
    assert "Traceback" not in done.stderr


def test_srun_and_torchrun_environments_are_understood(tmp_path: Path) -> None:
    path = write_config(tmp_path, small_run(tmp_path, method={"name": "ncl"}))
    slurm = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}
    done = program("launch/train.py", "--config", path, **slurm)
    assert done.returncode == 0, done.stderr
    # The same command over a finished run has nothing left to do.
    again = command(
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "launch/train.py", "--config", path
    )
    assert again.returncode == 0, again.stderr
    assert "train food" not in again.stderr


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("WORLD_SIZE", "abc", "WORLD_SIZE: found 'abc'"), ("RANK", "3", "RANK: found 3, allowed: 0 to 0")],
)
def test_environment_that_makes_no_sense_is_one_line(tmp_path: Path, name: str, value: str, expected: str) -> None:
    path = write_config(tmp_path, small_run(tmp_path))
    environment = {"WORLD_SIZE": "1", name: value}
    done = program("launch/train.py", "--config", path, **environment)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"das_ds: {expected}") and done.stderr.count("\n") == 1
