"""The folder of checkpoints: what is kept, what is found, and every way in which a checkpoint can be damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from das_ds.checkpoint.manifest import MANIFEST_FILE, FileRecord, Manifest, RunState, read_manifest
from das_ds.checkpoint.store import CheckpointStore
from das_ds.errors import CheckpointError
from das_ds.storage import checksum, read_json_with_checksum, write_json_with_checksum

FILE = "rank_00000_of_00001.safetensors"


def save(store: CheckpointStore, name: str, content: bytes = b"tensors", **run: object) -> Path:
    partial = store.staging_dir(name)
    partial.mkdir(parents=True)
    (partial / FILE).write_bytes(content)
    record = FileRecord(size=len(content), sha256=checksum(partial / FILE))
    store.publish(
        Manifest(
            name=name,
            run=RunState.model_validate(run),
            world_size=1,
            zero_stage=2,
            metadata={"engine": {"scale": 0.1}},
            metrics_bytes=0,
            wandb_run_id=None,
            saved_at="2026-01-01T00:00:00+00:00",
            versions={},
            files={FILE: record},
        )
    )
    return store.folder / name


def problems(store: CheckpointStore, name: str) -> list[str]:
    try:
        return store.find_problems(name, read_manifest(store.folder / name), lambda index: True)
    except CheckpointError as error:
        return [str(error)]


def test_store_publish_keeps_newest_and_domain_ends(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for number in range(4):
        save(store, f"{number:06d}_food_train_{number}", phase="train")
    save(store, "000004_food_before_0", phase="before", domains_done=1)
    save(store, "000005_food_before_0", phase="before", domains_done=1, within_phase=True)
    for number in range(6, 9):
        save(store, f"{number:06d}_papers_train_{number}", phase="train", domains_done=1)
    assert store.names() == ["000004_food_before_0", "000007_papers_train_7", "000008_papers_train_8"]
    store.wait_for_removals()
    assert sorted(path.name for path in store.folder.iterdir()) == store.names()


def test_store_quarantined_number_is_not_reused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    assert store.next_number == 0 and store.names() == []
    save(store, "000000_food_train_1", phase="train")
    save(store, "999999_food_train_2", phase="train")
    save(store, "1000000_food_train_3", phase="train")
    assert store.names() == ["999999_food_train_2", "1000000_food_train_3"]
    store.quarantine("1000000_food_train_3", ["it is torn"])
    assert "1000000_food_train_3 is corrupt" in caplog.text and "it is torn" in caplog.text
    assert store.names() == ["999999_food_train_2"] and store.next_number == 1000001 and store.has_corrupted


def test_store_unfinished_checkpoint_is_not_listed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    partial = store.staging_dir("000000_food_train_1")
    partial.mkdir(parents=True)
    (partial / FILE).write_bytes(b"half")
    assert store.names() == []
    store.clear_staging()
    assert list(store.folder.iterdir()) == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(folder: Path) -> None:
    path = folder / MANIFEST_FILE
    path.write_text(path.read_text().replace('"domain_step": 7', '"domain_step": 8'))


def rewrite(folder: Path, **changes: object) -> None:
    """Write other values, with a checksum that matches them."""
    path = folder / MANIFEST_FILE
    write_json_with_checksum(path, {**read_json_with_checksum(path), **changes})


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / FILE).write_bytes(b"tensor"), "has 6 bytes, expected 7"),
    (lambda folder: flip(folder / FILE), "was altered"),
    (lambda folder: (folder / FILE).unlink(), "cannot be read"),
    (edit, "manifest.json was altered"),
    (lambda folder: (folder / MANIFEST_FILE).write_text(""), "manifest.json is no JSON object"),
    (lambda folder: (folder / MANIFEST_FILE).unlink(), "manifest.json cannot be read"),
    (lambda folder: (folder / MANIFEST_FILE).write_text(json.dumps({"sha256": 1})), "manifest.json was altered"),
    (lambda folder: rewrite(folder, format_version=1), "found format_version 1, expected 3; another version of das_ds"),
    (lambda folder: rewrite(folder, zero_stage="two"), "manifest.json: zero_stage: Input should be a valid integer"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_find_problems_corrupt_checkpoint_is_described(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    folder = save(store, "000000_food_train_7", phase="train", domain_step=7)
    assert problems(store, folder.name) == []
    damage(folder)
    assert [message in problem for problem in problems(store, folder.name)] == [True]


def test_read_manifest_of_another_folder_raises(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    message = "manifest.json belongs to 000000_food_train_1, found in 000009_food_train_9"
    save(store, "000000_food_train_1", phase="train").rename(store.folder / "000009_food_train_9")
    assert problems(store, "000009_food_train_9") == [message]


def test_store_publish_on_full_disk_keeps_previous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, "000000_food_train_1", phase="train")

    def full(self: Manifest, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Manifest, "write", full)
    with pytest.raises(CheckpointError, match=r"000001_food_train_2: cannot be written \(No space left on device\)"):
        save(store, "000001_food_train_2", phase="train")
    assert store.names() == ["000000_food_train_1"] and problems(store, "000000_food_train_1") == []


def test_store_failed_removal_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(f"not allowed: {path}")

    monkeypatch.setattr("das_ds.checkpoint.store.shutil.rmtree", fail)
    store = CheckpointStore(tmp_path, keep=1)
    for number in range(4):
        save(store, f"{number:06d}_food_train_{number}", phase="train")
    store.wait_for_removals()
    assert store.names() == ["000003_food_train_3"]
    assert caplog.text.count("an old checkpoint cannot be removed") == 1 and "not allowed" in caplog.text
