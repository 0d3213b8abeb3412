"""The run folder: made once, continued by the same run, refused to anything else."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from das_ds.config.io import load_config
from das_ds.errors import RunFolderError
from das_ds.run_dir import open_run_dir
from helpers.training import run_config


def test_open_run_dir_new_folder_gets_resolved_config(tmp_path: Path) -> None:
    config = run_config(tmp_path / "a" / "run")
    folder = open_run_dir(config)
    assert load_config(folder.root / "config.yaml") == config
    assert folder.model(3, "acl") == tmp_path / "a" / "run" / "domains" / "03_acl" / "model"


def test_open_run_dir_same_run_passes(tmp_path: Path) -> None:
    open_run_dir(run_config(tmp_path / "run"))
    open_run_dir(run_config(tmp_path / "run", wandb={"mode": "offline"}))


@pytest.mark.parametrize(
    "computed", ["metrics.jsonl", "results.json", "checkpoints/000000_acl_before_0/manifest.json", "domains/00_acl/x"]
)
def test_open_run_dir_another_run_raises_with_differing_keys(tmp_path: Path, computed: str) -> None:
    open_run_dir(run_config(tmp_path))
    (tmp_path / computed).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / computed).write_text("{}")
    with pytest.raises(RunFolderError, match=r"another run.*seed: was 0, now 1"):
        open_run_dir(run_config(tmp_path, seed=1))
    assert load_config(tmp_path / "config.yaml").seed == 0


def test_open_run_dir_after_failed_starts_replaces_config(tmp_path: Path) -> None:
    first = run_config(tmp_path)
    open_run_dir(first)
    # What a start leaves that failed as late as possible, while the engine was built.
    for name in ("wandb_run_id", "revisions.json", "metrics.jsonl", "run.lock", "hang-rank1.txt", "STOP"):
        (tmp_path / name).touch()
    (tmp_path / "wandb").mkdir()
    (tmp_path / "checkpoints" / ".partial-000000_acl_before_0").mkdir(parents=True)
    fixed = run_config(tmp_path, seed=1)
    open_run_dir(fixed)
    assert load_config(tmp_path / "config.yaml") == fixed
    assert load_config(tmp_path / "config.replaced.yaml") == first
    # They belong to the config that is gone.
    assert not (tmp_path / "wandb_run_id").exists() and not (tmp_path / "revisions.json").exists()


def test_open_run_dir_unreadable_config_is_replaced_or_named(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    open_run_dir(config)
    (tmp_path / "config.yaml").write_text("no_such_key: 1\n")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"another run; its config.yaml cannot be used: .*no_such_key"):
        open_run_dir(config)
    (tmp_path / "results.json").unlink()
    open_run_dir(config)
    assert load_config(tmp_path / "config.yaml") == config


def test_open_run_dir_ignores_half_written_config(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.123").write_text("output_dir:")
    open_run_dir(run_config(tmp_path))


def test_open_run_dir_folder_without_run_raises(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match=r"not empty and contains no run \(no config.yaml\)"):
        open_run_dir(run_config(tmp_path))


def test_open_run_dir_file_in_place_of_folder_raises(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(RunFolderError, match="output_dir: cannot write"):
        open_run_dir(run_config(tmp_path / "run"))


def test_open_run_dir_full_disk_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(RunFolderError, match="No space left on device"):
        open_run_dir(run_config(tmp_path / "run"))
