"""Commands as users start them: DeepSpeed's launcher, exit codes, one line per error."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from das_ds.reporting.results import Results
from das_ds.run_dir import RESULTS_FILE
from helpers.commands import command, on_two_ranks, program, write_config
from helpers.runs import small_run

pytestmark = pytest.mark.multirank


def test_train_two_ranks_agrees_with_evaluate(tmp_path: Path) -> None:
    values = small_run(tmp_path, deepspeed="zero3")
    path = write_config(tmp_path, values)
    done = on_two_ranks("launch/train.py", "--config", path, "train.micro_batch_size=2")
    assert done.returncode == 0, done.stderr
    results = Results.read(values["output_dir"] / RESULTS_FILE)
    assert results.complete and results.world_size == 2 and results.zero_stage == 3
    plots = [values["output_dir"] / "report" / name for name in ("loss_matrix.png", "importance.png")]
    # Programs and ranks that come from the fork server draw no more than one pixel.
    assert all(min(Image.open(plot).size) > 100 for plot in plots)
    model = values["output_dir"] / "domains" / "01_papers" / "model"
    shown = command(sys.executable, "launch/evaluate.py", "--config", path, "--model", model)
    assert shown.returncode == 0, shown.stderr
    losses = json.loads(shown.stdout.splitlines()[-1])
    assert losses == pytest.approx(dict(zip(results.eval_domains, results.loss_matrix[-1], strict=True)), rel=1e-6)


def test_train_non_finite_loss_names_the_step(tmp_path: Path) -> None:
    path = write_config(tmp_path, small_run(tmp_path, method={"name": "ncl"}))
    done = program("launch/train.py", "--config", path, "train.learning_rate=1e38", "train.max_grad_norm=0")
    assert done.returncode == 2, done.stderr
    assert "das_ds: food, step 2: loss is nan, expected a finite number" in done.stderr


@pytest.mark.parametrize("module", ["das_ds", "das_ds.cli"])
def test_module_equals_command(tmp_path: Path, module: str) -> None:
    path = write_config(tmp_path, small_run(tmp_path))
    # The DeepSpeed launcher puts the rank before the command's own words.
    done = command(sys.executable, "-m", module, "--local_rank=0", "check-config", "--config", path, "seed=5")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["seed"] == 5
    assert command(sys.executable, "-m", module, "check-config", "--config", path, "seed=x").returncode == 2
