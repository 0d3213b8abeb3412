"""The commands within one process: one line per error, the config with its defaults, and help."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from das_ds.cli import main
from helpers.commands import write_config
from helpers.runs import small_run


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
