"""The commands within one process: one line per error, the config with its defaults, and help."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import yaml

import das_ds
from das_ds.cli import main
from das_ds.config.schema import config_keys
from das_ds.errors import ConfigError
from helpers.commands import write_config
from helpers.runs import small_run


def test_check_config_wrong_key_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, small_run(tmp_path))
    assert main(["check-config", "--config", str(path), "train.learning_rat=1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("das_ds: ") and error.count("\n") == 1 and "train.learning_rate" in error


def test_check_config_prints_every_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, small_run(tmp_path))
    assert main(["check-config", "--config", str(path), "seed=5"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["seed"] == 5 and shown["method"]["contrastive"]["temperature"] == 0.05


def test_help_explains_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for key in ("train.learning_rate", "method.replay.fraction", "domains.0.train", "wandb.mode"):
        assert key in text


@pytest.mark.parametrize("section", ["train", "model.lora", "domains", "method", "data.sequence_length"])
def test_help_of_a_section_has_its_keys_only(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help", section])
    text = capsys.readouterr().out
    shown = [line.split()[0] for line in text.splitlines() if line[:1] not in ("", " ")][1:]
    assert shown == [key for key in config_keys() if f"{key}.".startswith(f"{section}.")]
    assert all(str(config_keys()[key].allowed)[:20] in text for key in shown if not config_keys()[key].is_section)


@pytest.mark.parametrize("section", [[], ["method"]])
def test_help_whose_reader_is_gone_ends_without_a_word(section: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "das_ds", "train", "--help", *section]
    with open(writing, "wb") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0 and "Error" not in done.stderr


@pytest.mark.parametrize(
    ("section", "hint"), [("trian", "did you mean train?"), ("zzz", "allowed: output_dir, continue_from, model, ")]
)
def test_help_of_an_unknown_section_is_one_line(section: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--help", section])
    error = capsys.readouterr().err
    assert error.startswith(f"das_ds: --help {section}: found no such section; {hint}") and error.count("\n") == 1


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"das_ds {das_ds.__version__}\n"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("deepspeed=zero9", "deepspeed: found 'zero9', which is no file in "),
        (
            "deepspeed={zero_optimisation: {stage: 2}}",
            "deepspeed zero_optimisation: unknown key; did you mean zero_opt",
        ),
        ("deepspeed={train_batch_size: 9}", "deepspeed train_batch_size: found 9 in the DeepSpeed file"),
        ("train.micro_batch_size=3", "train.global_batch_size: found 8, expected a multiple of train.micro_batch_size"),
        (
            "train.steps_per_domain=100000000000000000000",
            "train.steps_per_domain: found 100000000000000000000, allowed:",
        ),
        ("data.cache_dir=$NOT_SET_HERE", "data.cache_dir: found '$NOT_SET_HERE', but the variable NOT_SET_HERE is not"),
    ],
)
def test_check_config_invalid_value_is_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, expected: str
) -> None:
    path = write_config(tmp_path, small_run(tmp_path))
    assert main(["check-config", "--config", str(path), override]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"das_ds: {expected}") and captured.err.count("\n") == 1
    assert not captured.out


@pytest.mark.parametrize("command", ["train", "evaluate", "finetune", "benchmark"])
def test_commands_take_timeouts_from_config(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[timedelta, timedelta]] = []

    def start(timeout: timedelta, collective_timeout: timedelta) -> None:
        started.append((timeout, collective_timeout))
        raise ConfigError("seen enough")

    monkeypatch.setattr("das_ds.distributed.process_group.init_process_group", start)
    task = dict.fromkeys(("name", "train", "dev", "test"), "task")
    path = write_config(tmp_path, small_run(tmp_path, tasks=[task], runtime={"hang_timeout": 1000.0}))
    model = [] if command in ("train", "benchmark") else ["--model", str(tmp_path)]
    output = ["--output", str(tmp_path / "scores.json")] if command == "finetune" else []
    assert main([command, "--config", str(path), *model, *output]) == 2
    assert started == [(timedelta(seconds=1000), timedelta(seconds=2120))]
