"""What batch files ask about a run config, and how it is refused."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import pytest

import das_ds
from das_ds.slurm import job_facts
from helpers.commands import write_config
from helpers.runs import small_run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path, small_run(tmp_path))


def facts(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["job_facts", *map(str, words)])
    return job_facts.main()


def test_facts_are_the_run_folder_and_versions(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert facts(monkeypatch, "--config", config, "output_dir=elsewhere/run") == 0
    folder, versions = capsys.readouterr().out.splitlines()
    libraries = " ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    place = Path(das_ds.__file__).resolve().parent
    assert folder == "elsewhere/run"
    assert versions == f"das_ds {das_ds.__version__} of {place}, python {platform.python_version()} {libraries}"


def test_wrong_config_is_exit_code_2_and_one_line(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert facts(monkeypatch, "--config", config, "train.learning_rat=1") == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("das_ds: ") and captured.err.count("\n") == 1
    assert "train.learning_rat" in captured.err
