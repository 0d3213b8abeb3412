"""Writing during training: the values at the start of the write, or an error."""

from __future__ import annotations

import hashlib
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from das_ds.checkpoint import async_writer
from das_ds.checkpoint.async_writer import BackgroundWriter
from das_ds.errors import CheckpointError

CPU = torch.device("cpu")


@pytest.mark.parametrize("asynchronous", [True, False])
def test_writer_file_holds_values_at_start(asynchronous: bool, tmp_path: Path) -> None:
    writer = BackgroundWriter(CPU, asynchronous=asynchronous)
    for number in range(3):
        live = {"weights": torch.randn(1000 + number), "moments": torch.randn(7).bfloat16()}
        fixed = {"scalar": torch.tensor(float("nan")), "none": torch.zeros(0)}
        expected = {key: value.clone() for key, value in {**live, **fixed}.items()}
        path = tmp_path / "new" / f"{number}.safetensors"
        writer.start(path, live, fixed)
        writer.wait_for_staging()
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
def test_writer_unwritable_folder_raises_then_recovers(asynchronous: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    writer = BackgroundWriter(CPU, asynchronous=asynchronous)
    writer.start(tmp_path / "file" / "a.safetensors", {"a": torch.ones(2)}, {})
    writer.wait_for_staging()
    with pytest.raises(CheckpointError, match=r"cannot be written.*free space; the previous checkpoint is intact"):
        writer.finish()
    writer.start(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {})
    writer.wait_for_staging()
    assert writer.finish().size > 0 and writer.failure is None


def test_writer_different_bytes_read_back_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_wrongly(tensors: dict[str, torch.Tensor], path: Path) -> None:
        real_save({key: value + 1 for key, value in tensors.items()}, path)

    real_save = async_writer.save_file
    monkeypatch.setattr(async_writer, "save_file", save_wrongly)
    writer = BackgroundWriter(CPU, asynchronous=True)
    writer.start(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {})
    with pytest.raises(CheckpointError, match="read back other values of a than were written"):
        writer.finish()


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_writer_unexpected_error_is_logged_and_raised_by_finish(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(tensors: dict[str, torch.Tensor], path: Path) -> None:
        raise error("no such thing")

    monkeypatch.setattr(async_writer, "save_file", fail)
    writer = BackgroundWriter(CPU, asynchronous=True)
    writer.start(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {})
    writer.wait_for_staging()
    with pytest.raises(CheckpointError, match="no such thing"):
        writer.finish()
    assert "unexpected error" in caplog.text and "Traceback" in caplog.text


def test_writer_allocates_staging_buffers_in_thread_once_per_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[torch.dtype, int, str]] = []

    def empty(size: int, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        taken.append((dtype, size, threading.current_thread().name))
        return real_empty(size, dtype=dtype, pin_memory=pin_memory)

    real_empty = torch.empty
    monkeypatch.setattr(torch, "empty", empty)
    writer = BackgroundWriter(CPU, asynchronous=True)
    generator = torch.Generator().manual_seed(0)
    live = {
        "matrix": torch.randn(5, 3, generator=generator),
        "transposed": torch.randn(4, 2, generator=generator).T,
        "none": torch.zeros(0),
        "number": torch.tensor(3.0),
        "halves": torch.randn(7, generator=generator).bfloat16(),
    }
    for number in range(2):
        path = tmp_path / f"{number}.safetensors"
        writer.start(path, live, {})
        writer.wait_for_staging()
        writer.finish()
        found = load_file(path)
        assert found.keys() == live.keys() and all(found[key].equal(value) for key, value in live.items())
    assert taken == [(torch.float32, 24, "checkpoint"), (torch.bfloat16, 7, "checkpoint")]


def test_wait_for_staging_returns_when_staging_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("no memory can be locked")

    monkeypatch.setattr(torch, "empty", no_room)
    writer = BackgroundWriter(CPU, asynchronous=True)
    writer.start(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {})
    writer.wait_for_staging()
    with pytest.raises(CheckpointError, match="no memory can be locked"):
        writer.finish()


class RecordedStream:
    """A stream without a GPU: what was asked of it, in order."""

    def __init__(self, asked: list[str], name: str) -> None:
        self.asked = asked
        self.name = name

    def record_event(self) -> RecordedStream:
        self.asked.append(f"{self.name} records")
        return self

    def wait_event(self, event: RecordedStream) -> None:
        self.asked.append(f"{self.name} waits for {event.name}")

    def synchronize(self) -> None:
        self.asked.append(f"host waits for {self.name}")


def test_writer_offloaded_values_are_staged_by_the_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    gate = threading.Event()

    def empty(size: int, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory and threading.current_thread() is not threading.main_thread()
        assert gate.wait(60)
        return real_empty(size, dtype=dtype)

    real_empty = torch.empty
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: RecordedStream(asked, "training"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: RecordedStream(asked, "copy"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    writer = BackgroundWriter(torch.device("cuda", 0), asynchronous=True)
    live = {"weights": torch.randn(100)}
    expected = live["weights"].clone()
    # Comes back though there is no memory for the copy yet.
    writer.start(tmp_path / "a.safetensors", live, {})
    gate.set()
    writer.wait_for_staging()
    live["weights"].zero_()
    writer.finish()
    assert load_file(tmp_path / "a.safetensors")["weights"].equal(expected)
    assert asked[:3] == ["training records", "copy waits for training", "copy records"]
    assert set(asked[3:]) == {"training waits for copy", "host waits for copy"}
