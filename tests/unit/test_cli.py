"""The commands as users start them: launchers, exit codes, one line per error."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from das_ds.cli import main
from das_ds.evaluation.results import RESULTS_FILE, Results
from helpers.commands import command, on_two_ranks, program, write_config
from helpers.runs import small_run


@pytest.mark.multirank
def test_deepspeed_launcher_trains_on_two_ranks_and_evaluate_agrees(tmp_path: Path) -> None:
    values = small_run(tmp_path, deepspeed="ds_configs/zero3.json")
    path = write_config(tmp_path, values)
    done = on_two_ranks("launch/train.py", "--config", path, "train.micro_batch_size=2")
    assert done.returncode == 0, done.stderr
    results = Results.read(values["output_dir"] / RESULTS_FILE)
    assert results.complete and results.world_size == 2 and results.zero_stage == 3
    pictures = [values["output_dir"] / "report" / name for name in ("loss_matrix.png", "importance.png")]
    # Programs and ranks that come from the fork server draw no more than one pixel.
    assert all(min(Image.open(picture).size) > 100 for picture in pictures)
    model = values["output_dir"] / "domains" / "01_papers" / "model"
    shown = command(sys.executable, "launch/evaluate.py", "--config", path, "--model", model)
    assert shown.returncode == 0, shown.stderr
    losses = json.loads(shown.stdout.splitlines()[-1])
    assert losses == pytest.approx(dict(zip(results.eval_domains, results.loss_matrix[-1], strict=True)), rel=1e-6)


@pytest.mark.multirank
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


def test_loss_that_is_not_finite_stops_with_its_step(tmp_path: Path) -> None:
    path = write_config(tmp_path, small_run(tmp_path, method={"name": "ncl"}))
    done = program("launch/train.py", "--config", path, "train.learning_rate=1e38", "train.grad_clip=0")
    assert done.returncode == 2, done.stderr
    assert "das_ds: food, step 2: loss is nan, expected a finite number" in done.stderr


def test_wrong_key_is_one_line_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, small_run(tmp_path))
    assert main(["check-config", "--config", str(path), "train.learning_rat=1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("das_ds: ") and error.count("\n") == 1 and "train.learning_rate" in error


def test_check_config_prints_every_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, small_run(tmp_path))
    assert main(["check-config", "--config", str(path), "seed=5"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["seed"] == 5 and shown["method"]["contrast"]["temperature"] == 0.05


def test_help_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for key in ("train.learning_rate", "method.softmask.apply_to", "domains.0.train", "wandb.mode"):
        assert key in text
