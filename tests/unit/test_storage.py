"""Atomic writes of files and folders, and their checksums."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from das_ds.storage import (
    CHECKSUM_FILE,
    MODEL_CARD,
    StagedDir,
    atomic_dir,
    atomic_write,
    checksum,
    find_corrupted,
    read_json_with_checksum,
    write_json_with_checksum,
)


def test_atomic_write_failure_keeps_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_atomic_dir_failure_keeps_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for text in ("one", "two"):
        with atomic_dir(folder) as partial:
            (partial / "part").mkdir()
            (partial / "part" / "weights").write_text(text)
    with pytest.raises(RuntimeError), atomic_dir(folder) as partial:
        (partial / "weights").write_text("three")
        raise RuntimeError
    assert (folder / "part" / "weights").read_text() == "two" and list(tmp_path.iterdir()) == [folder]


def test_staged_dir_that_was_not_published_is_cleared_and_never_seen(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    killed = StagedDir(folder)
    killed.create()
    (killed.partial / "model-00001-of-00002.safetensors").write_text("half a model")
    assert not folder.exists()
    staged = StagedDir(folder)
    staged.create()
    (staged.partial / "model.safetensors").write_text("whole")
    staged.publish()
    assert sorted(path.name for path in folder.iterdir()) == [CHECKSUM_FILE, "model.safetensors"]
    assert list(tmp_path.iterdir()) == [folder]


def test_staged_dir_records_known_checksums_without_reading(tmp_path: Path) -> None:
    staged = StagedDir(tmp_path / "model")
    staged.create()
    for name in ("a", "b"):
        (staged.partial / name).write_text(name)
    staged.publish({"a": "of another process"})
    lines = (staged.folder / CHECKSUM_FILE).read_text().splitlines()
    assert lines[0] == "of another process  a" and lines[1] == f"{checksum(staged.folder / 'b')}  b"
    assert find_corrupted(staged.folder) == ["a"]


def test_write_checksums_matches_sha256sum(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with atomic_dir(folder) as partial:
        (partial / "weights").write_bytes(b"\x00\x01")
        (partial / "config").write_text("{}")
    check = ["sha256sum", "--check", "--strict", CHECKSUM_FILE]
    assert subprocess.run(check, cwd=folder, check=False, capture_output=True).returncode == 0
    assert find_corrupted(folder) == []
    (folder / "weights").write_bytes(b"\x00\x00")
    (folder / "config").unlink()
    assert find_corrupted(folder) == ["config", "weights"]
    (folder / CHECKSUM_FILE).unlink()
    assert find_corrupted(folder) == []


def test_model_card_has_no_checksum(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with atomic_dir(folder) as partial:
        (partial / MODEL_CARD).write_text("before")
        (partial / "config").write_text("{}")
    (folder / MODEL_CARD).write_text("edited by its reader")
    assert find_corrupted(folder) == []


def test_read_json_with_checksum_altered_raises(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    content = {"loss": 0.1 + 0.2, "name": "Tromsø", "nested": {"a": [1, None]}}
    write_json_with_checksum(path, content)
    assert read_json_with_checksum(path) == content
    path.write_text(path.read_text().replace("null", "0"))
    with pytest.raises(ValueError, match="was altered"):
        read_json_with_checksum(path)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_atomic_dir_files_have_umask_mode(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        save_file({"a": torch.zeros(1)}, tmp_path / "by_library")
        with atomic_write(tmp_path / "file") as partial:
            save_file({"a": torch.zeros(1)}, partial)
        with atomic_dir(tmp_path / "folder") as partial:
            (partial / "part").mkdir()
            save_file({"a": torch.zeros(1)}, partial / "part" / "weights")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    # The library alone leaves a file that other users cannot read.
    assert modes.pop("by_library") == 0o600
    assert modes == {"file": mode, "weights": mode, CHECKSUM_FILE: mode}
