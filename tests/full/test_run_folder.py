"""Starts over one run folder on real ranks: failed and fixed, two at once, and one after another that was killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from das_ds.reporting.results import Results
from das_ds.run_dir import LOCK_FILE, RESULTS_FILE
from helpers.command_runs import exit_codes, start_training, take_half_a_second_per_step, wait_until
from helpers.commands import program, write_config
from helpers.runs import last_step, metrics_lines, small_run

pytestmark = pytest.mark.multirank


def test_start_after_fixed_config_error_runs(tmp_path: Path) -> None:
    values = small_run(tmp_path, method={"name": "ncl"}, train={"steps_per_domain": 2})
    path = write_config(tmp_path, values)
    wrong_values = ("data.tokenizer=no/such/folder", "model.config.model_type=roberto", "data.sequence_length=4000")
    for wrong in (*wrong_values, "method={name: directions, init_from: no/such/file}"):
        failed = program("launch/train.py", "--config", path, wrong)
        assert failed.returncode == 2, failed.stderr
    done = program("launch/train.py", "--config", path)
    assert done.returncode == 0, done.stderr
    assert Results.read(values["output_dir"] / RESULTS_FILE).complete
    other = program("launch/train.py", "--config", path, "seed=1")
    assert other.returncode == 2 and "belongs to another run" in other.stderr


def test_second_start_in_same_folder_exits_2_and_first_completes(tmp_path: Path) -> None:
    values = small_run(tmp_path, method={"name": "ncl"}, train={"log_interval": 1})
    run = values["output_dir"]
    second_folder = tmp_path / "second"
    second_folder.mkdir()
    first = start_training(values, tmp_path, 2, take_half_a_second_per_step)
    try:
        wait_until(lambda: last_step(run) > 0, "the first step")
        second = exit_codes(start_training(values, second_folder, 2))
        assert second == [2, 2]
        (line,) = (second_folder / "stderr_0").read_text().splitlines()[-1:]
        assert line.startswith(f"das_ds: output_dir: {run} is held by another start, pid {first[0].pid} on ")
    finally:
        codes = exit_codes(first)
    assert codes == [0, 0]
    assert [step["global_step"] for step in metrics_lines(run)] == list(range(1, 13))
    assert not (run / LOCK_FILE).exists()


def test_start_after_kill_acquires_lock(tmp_path: Path) -> None:
    values = small_run(tmp_path, method={"name": "ncl"}, train={"log_interval": 1})
    run = values["output_dir"]
    first = start_training(values, tmp_path, 2, take_half_a_second_per_step)
    try:
        wait_until(lambda: last_step(run) > 0, "the first step")
    finally:
        for process in first:
            process.kill()
            process.join()
    assert (run / LOCK_FILE).exists()
    assert exit_codes(start_training(values, tmp_path, 2)) == [0, 0]
    assert not (run / LOCK_FILE).exists()
