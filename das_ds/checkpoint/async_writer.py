"""Background writer: writes one rank's checkpoint file while training continues, from a staged copy in host memory."""

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

Stage = Callable[[], dict[str, torch.Tensor]]
"""Makes the copies in host memory and returns them when they are complete."""


class BackgroundWriter:
    """Writes one file at a time on a background thread.

    Values that training changes are staged first: copied while the forward and backward passes only read them. Code
    that is about to change them calls `wait_for_staging`. The staging buffers are reused and together as large as one
    file. With a GPU they are pinned, so that the GPU copies by itself; pinning takes seconds, and the thread does it.

    Args:
        device: where the values are.
        asynchronous: False writes before `start` returns, without staging.
        fsync_also: files that other code appends to, flushed to disk with each file written here.
    """

    def __init__(self, device: torch.device, *, asynchronous: bool, fsync_also: Sequence[Path] = ()) -> None:
        self._device = device
        self._asynchronous = asynchronous
        self._fsync_also = fsync_also
        self._buffers: dict[torch.dtype, torch.Tensor] = {}
        self._is_staged: threading.Event | None = None
        self._staged_on_gpu: torch.cuda.Event | None = None
        self._thread: threading.Thread | None = None
        self._record: FileRecord | None = None
        self.failure: CheckpointError | None = None
        """Why the last file could not be written."""
        self.write_seconds = 0.0
        """Time that the last file took, in the background where asynchronous."""

    @property
    def is_busy(self) -> bool:
        """Whether a file is being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, path: Path, mutable: dict[str, torch.Tensor], immutable: dict[str, torch.Tensor]) -> None:
        """Begin to write a file; the one before must be finished.

        Args:
            path: the file.
            mutable: values that must not change before `wait_for_staging`.
            immutable: values in host memory that never change.
        """
        assert not self.is_busy, "one file at a time"
        self.failure = None
        self._record = None
        if self._asynchronous:
            stage = self._make_stage(dict(mutable))
            self._thread = threading.Thread(
                target=self._write, args=(path, stage, immutable), name="checkpoint", daemon=True
            )
            self._thread.start()
        else:
            self._write(path, lambda: {key: value.cpu() for key, value in mutable.items()}, immutable)

    def wait_for_staging(self) -> None:
        """Wait until the values may change; on a GPU only its stream waits."""
        if self._is_staged is not None:
            self._is_staged.wait()
            self._is_staged = None
        if self._staged_on_gpu is not None:
            torch.cuda.current_stream().wait_event(self._staged_on_gpu)
            self._staged_on_gpu = None

    def finish(self) -> FileRecord:
        """Wait for the file.

        Raises:
            CheckpointError: it could not be written, or reads back differently.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self.failure is not None:
            raise self.failure
        assert self._record is not None, "a file was started"
        return self._record

    def _make_stage(self, mutable: dict[str, torch.Tensor]) -> Stage:
        """The function that stages the values as they are now; the thread calls it."""
        is_staged = threading.Event()
        self._is_staged = is_staged
        on_gpu = self._device.type == "cuda"
        # Recorded on the training stream, after the last kernels that change the values; the thread's stream waits.
        computed = torch.cuda.current_stream(self._device).record_event() if on_gpu else None

        def stage() -> dict[str, torch.Tensor]:
            staged_on_gpu = None
            try:
                if computed is None:
                    copies = self._copy(mutable)
                else:
                    copies, staged_on_gpu = self._copy_on_gpu(mutable, computed)
                    self._staged_on_gpu = staged_on_gpu
            finally:
                # Also after an error: training would wait forever for an event that is never set.
                mutable.clear()
                is_staged.set()
            if staged_on_gpu is not None:
                staged_on_gpu.synchronize()
            return copies

        return stage

    def _copy_on_gpu(
        self, mutable: dict[str, torch.Tensor], computed: torch.cuda.Event
    ) -> tuple[dict[str, torch.Tensor], torch.cuda.Event]:
        """The copies, and the event after which they are complete; offloaded values are copied on return."""
        stream = torch.cuda.Stream(self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            stream.wait_event(computed)
            copies = self._copy(mutable)
            staged = stream.record_event()
        for value in mutable.values():
            if value.is_cuda:
                # The allocator must not reuse the memory of temporary values before this stream has read them.
                value.record_stream(stream)
        return copies, staged

    def _copy(self, mutable: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        copies = self._staging_views(mutable)
        for key, value in mutable.items():
            copies[key].copy_(value, non_blocking=True)
        return copies

    def _staging_views(self, mutable: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Key -> a view of the staging buffer of its dtype, with the shape of the value."""
        sizes: Counter[torch.dtype] = Counter()
        for value in mutable.values():
            sizes[value.dtype] += value.numel()
        for dtype, size in sizes.items():
            if dtype not in self._buffers or self._buffers[dtype].numel() < size:
                # The old buffer is freed first, because host memory may not hold both.
                self._buffers.pop(dtype, None)
                self._buffers[dtype] = torch.empty(size, dtype=dtype, pin_memory=self._device.type == "cuda")
        views = {}
        used: Counter[torch.dtype] = Counter()
        for key, value in mutable.items():
            start = used[value.dtype]
            views[key] = self._buffers[value.dtype][start : start + value.numel()].view(value.shape)
            used[value.dtype] += value.numel()
        return views

    def _write(self, path: Path, stage: Stage, immutable: dict[str, torch.Tensor]) -> None:
        began = time.perf_counter()
        try:
            tensors = {**stage(), **immutable}
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as partial:
                save_file(tensors, partial)
            for other in self._fsync_also:
                if other.exists():
                    sync(other)
            _verify(path, tensors)
            self._record = FileRecord(size=path.stat().st_size, sha256=checksum(path))
        except CheckpointError as error:
            self.failure = error
        except (Exception, SystemExit) as error:
            if not isinstance(error, OSError | SafetensorError):
                # Neither disk nor permissions, so a bug: log where it came from.
                logger.error("%s: unexpected error while a checkpoint was written", path, exc_info=error)
            self.failure = CheckpointError(
                f"{path.parent}: the checkpoint cannot be written ({error}); the run folder must be writable and have "
                "free space; the previous checkpoint is intact"
            )
        self.write_seconds = time.perf_counter() - began


def _verify(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Read a file back and compare it with the intended content."""
    with safe_open(path, framework="pt") as file:
        for key, value in tensors.items():
            if not torch.equal(_bytes(file.get_tensor(key)), _bytes(value)):
                raise CheckpointError(f"{path}: read back other values of {key} than were written; possible disk error")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    # Compared as bytes, because NaN differs from itself.
    return tensor.reshape(-1).view(torch.uint8)
