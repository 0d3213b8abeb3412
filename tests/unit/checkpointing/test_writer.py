"""Writing beside training: the values of the moment, whatever happens to them afterwards, or an error."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from das_ds.checkpointing import writer as module
from das_ds.checkpointing.writer import BackgroundWriter
from das_ds.errors import CheckpointError

CPU = torch.device("cpu")


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_file_holds_the_values_of_the_moment(asynchronous: bool, tmp_path: Path) -> None:
    writer = BackgroundWriter(CPU, asynchronous=asynchronous)
    for number in range(3):
        live = {"weights": torch.randn(1000 + number), "moments": torch.randn(7).bfloat16()}
        fixed = {"scalar": torch.tensor(float("nan")), "none": torch.zeros(0)}
        expected = {key: value.clone() for key, value in {**live, **fixed}.items()}
        path = tmp_path / "new" / f"{number}.safetensors"
        writer.start(path, live, fixed)
        writer.wait_for_copy()
        for value in live.values():
            value.zero_()
        record = writer.finish()
        found = load_file(path)
        assert found.keys() == expected.keys()
        assert all(found[key].equal(value) or value.isnan().any() for key, value in expected.items())
        assert found["scalar"].isnan()
        assert record.size == path.stat().st_size
        assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_folder_that_cannot_be_written(asynchronous: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    writer = BackgroundWriter(CPU, asynchronous=asynchronous)
    writer.start(tmp_path / "file" / "a.safetensors", {"a": torch.ones(2)}, {})
    writer.wait_for_copy()
    with pytest.raises(CheckpointError, match=r"cannot be written.*free space; the checkpoint before it is as it was"):
        writer.finish()
    writer.start(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {})
    writer.wait_for_copy()
    assert writer.finish().size > 0 and writer.failure is None


def test_a_disk_that_gives_back_other_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_wrongly(tensors: dict[str, torch.Tensor], path: Path) -> None:
        real_save({key: value + 1 for key, value in tensors.items()}, path)

    real_save = module.save_file
    monkeypatch.setattr(module, "save_file", save_wrongly)
    writer = BackgroundWriter(CPU, asynchronous=True)
    writer.start(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {})
    with pytest.raises(CheckpointError, match="read back other values of a than were written"):
        writer.finish()


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_an_unexpected_error_beside_training_is_logged_and_raised_by_finish(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(tensors: dict[str, torch.Tensor], path: Path) -> None:
        raise error("no such thing")

    monkeypatch.setattr(module, "save_file", fail)
    writer = BackgroundWriter(CPU, asynchronous=True)
    writer.start(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {})
    writer.wait_for_copy()
    with pytest.raises(CheckpointError, match="no such thing"):
        writer.finish()
    assert "unexpected error" in caplog.text and "Traceback" in caplog.text
