"""Writing one rank's file while training goes on, from a copy in host memory."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from das_ds.checkpoint.manifest import FileRecord
from das_ds.errors import CheckpointError
from das_ds.storage import atomic_write, checksum, sync

logger = logging.getLogger(__name__)

Copy = Callable[[], dict[str, torch.Tensor]]
"""Gives the copies in host memory when they are complete."""


class BackgroundWriter:
    """Writes one file at a time on a thread of its own.

    Values that training changes are copied first, beside the forward and backward passes that only read them; whoever
    is about to change them calls `wait_for_copy`. The copies lie in the same memory each time: one file's size. Beside
    a GPU it is page-locked, so that the GPU copies by itself; taking it lasts seconds, and is the thread's work too.

    Args:
        device: where the values are.
        asynchronous: False writes before `start` returns, without a copy.
        beside: files that others append to and that are flushed to disk with each file written here.
    """

    def __init__(self, device: torch.device, *, asynchronous: bool, beside: Sequence[Path] = ()) -> None:
        self._device, self._asynchronous, self._beside = device, asynchronous, beside
        self._buffers: dict[torch.dtype, torch.Tensor] = {}
        self._is_copied: threading.Event | None = None
        self._copied_on_gpu: torch.cuda.Event | None = None
        self._thread: threading.Thread | None = None
        self._record: FileRecord | None = None
        self.failure: CheckpointError | None = None
        """What went wrong with the file that was written last."""
        self.write_seconds = 0.0
        """Time that the last file took, beside training where asynchronous."""

    @property
    def is_busy(self) -> bool:
        """Whether a file is being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, path: Path, live: dict[str, torch.Tensor], fixed: dict[str, torch.Tensor]) -> None:
        """Begin to write a file; the one before must be finished.

        Args:
            path: the file.
            live: values that must not change before `wait_for_copy`.
            fixed: values in host memory that nobody changes.
        """
        assert not self.is_busy, "one file at a time"
        self.failure = self._record = None
        if self._asynchronous:
            copy = self._copy_of(dict(live))
            self._thread = threading.Thread(
                target=self._write, args=(path, copy, fixed), name="checkpoint", daemon=True
            )
            self._thread.start()
        else:
            self._write(path, lambda: {key: value.cpu() for key, value in live.items()}, fixed)

    def wait_for_copy(self) -> None:
        """Return when the values may change."""
        if self._is_copied is not None:
            self._is_copied.wait()
            self._is_copied = None
        if self._copied_on_gpu is not None:
            torch.cuda.current_stream().wait_event(self._copied_on_gpu)
            self._copied_on_gpu = None

    def finish(self) -> FileRecord:
        """Wait for the file.

        Raises:
            CheckpointError: it could not be written, or does not hold what was to be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self.failure is not None:
            raise self.failure
        assert self._record is not None, "a file was started"
        return self._record

    def _copy_of(self, live: dict[str, torch.Tensor]) -> Copy:
        """The copy as the thread makes it, of the values as they are now."""
        is_copied = self._is_copied = threading.Event()
        on_gpu = self._device.type == "cuda"
        # Recorded here, where the values' last changes were asked for; waited for on the thread's own stream.
        computed = torch.cuda.current_stream(self._device).record_event() if on_gpu else None

        def copy() -> dict[str, torch.Tensor]:
            copied = None
            try:
                if computed is None:
                    stored = self._stored(live)
                else:
                    stored, copied = self._stored_beside_the_gpu(live, computed)
                    self._copied_on_gpu = copied
            finally:
                live.clear()
                is_copied.set()
            if copied is not None:
                copied.synchronize()
            return stored

        return copy

    def _stored_beside_the_gpu(
        self, live: dict[str, torch.Tensor], computed: torch.cuda.Event
    ) -> tuple[dict[str, torch.Tensor], torch.cuda.Event]:
        """(the copies, when they are complete); offloaded values are copied when this returns."""
        stream = torch.cuda.Stream(self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            stream.wait_event(computed)
            stored = self._stored(live)
            copied = stream.record_event()
        for value in live.values():
            if value.is_cuda:
                # What was made for this checkpoint alone must not give its memory to others before it is copied.
                value.record_stream(stream)
        return stored, copied

    def _stored(self, live: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        places = self._places(live)
        for key, value in live.items():
            places[key].copy_(value, non_blocking=True)
        return places

    def _places(self, live: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Where the copies lie: one after the other in one stretch of memory per dtype."""
        sizes: Counter[torch.dtype] = Counter()
        for value in live.values():
            sizes[value.dtype] += value.numel()
        for dtype, size in sizes.items():
            if dtype not in self._buffers or self._buffers[dtype].numel() < size:
                # Before a larger one is made: there may be no room for both.
                self._buffers.pop(dtype, None)
                self._buffers[dtype] = torch.empty(size, dtype=dtype, pin_memory=self._device.type == "cuda")
        places, filled = {}, Counter[torch.dtype]()
        for key, value in live.items():
            first = filled[value.dtype]
            places[key] = self._buffers[value.dtype][first : first + value.numel()].view(value.shape)
            filled[value.dtype] += value.numel()
        return places

    def _write(self, path: Path, copy: Copy, fixed: dict[str, torch.Tensor]) -> None:
        began = time.perf_counter()
        try:
            tensors = {**copy(), **fixed}
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as partial:
                save_file(tensors, partial)
            for other in self._beside:
                if other.exists():
                    sync(other)
            _check(path, tensors)
            self._record = FileRecord(size=path.stat().st_size, sha256=checksum(path))
        except CheckpointError as error:
            self.failure = error
        except (Exception, SystemExit) as error:
            if not isinstance(error, OSError | SafetensorError):
                # Neither disk nor permissions: whoever mends it needs to know where it came from.
                logger.error("%s: unexpected error while a checkpoint was written", path, exc_info=error)
            self.failure = CheckpointError(
                f"{path.parent}: the checkpoint cannot be written ({error}); the run folder must be writable and have "
                "free space; the checkpoint before it is as it was"
            )
        self.write_seconds = time.perf_counter() - began


def _check(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        for key, value in tensors.items():
            if not torch.equal(_bytes(file.get_tensor(key)), _bytes(value)):
                raise CheckpointError(f"{path}: read back other values of {key} than were written; is the disk sound?")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    # Compared as bytes: a number that is not one differs from itself.
    return tensor.reshape(-1).view(torch.uint8)
