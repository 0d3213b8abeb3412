"""The run folder: made once, continued by the same run, refused to anything else."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from das_ds.config_io import load_config
from das_ds.errors import RunFolderError
from das_ds.training.run_folder import open_run_folder
from helpers.training import run_config


def test_new_folder_gets_the_resolved_config(tmp_path: Path) -> None:
    config = run_config(tmp_path / "a" / "run")
    folder = open_run_folder(config)
    assert load_config(folder.root / "config.yaml") == config
    assert folder.model(3, "acl") == tmp_path / "a" / "run" / "domains" / "03_acl" / "model"


def test_same_run_may_come_back(tmp_path: Path) -> None:
    open_run_folder(run_config(tmp_path / "run"))
    open_run_folder(run_config(tmp_path / "run", wandb={"mode": "offline"}))


def test_another_run_is_refused_with_the_differing_keys(tmp_path: Path) -> None:
    open_run_folder(run_config(tmp_path))
    with pytest.raises(RunFolderError, match=r"another run.*seed: was 0, now 1"):
        open_run_folder(run_config(tmp_path, seed=1))


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match=r"not empty and holds no run \(no config.yaml\)"):
        open_run_folder(run_config(tmp_path))


def test_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(RunFolderError, match="output_dir: cannot write"):
        open_run_folder(run_config(tmp_path / "run"))


def test_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(RunFolderError, match="No space left on device"):
        open_run_folder(run_config(tmp_path / "run"))
