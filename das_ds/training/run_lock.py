"""Run lock: only one start at a time trains in a run folder; the lock of a killed process expires.

The file `run.lock` names the process that holds the folder and contains its heartbeat, a number that increases every
few seconds. Whether the holder is alive is decided by the most reliable evidence available:

1. On the holder's node: whether its process exists; from another container of that node, the lock of the file system
   (`fcntl.lockf`), which ends with its process.
2. On any other node, or if the file system has no locks: its heartbeat. If that does not change for `STALE_S` seconds,
   the process was killed or its node is gone. Heartbeats are counters, not times, so that clocks may differ.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Annotated

import psutil
from pydantic import Field, TypeAdapter

from das_ds.errors import RunFolderError
from das_ds.run_dir import LOCK_FILE

logger = logging.getLogger(__name__)

BEAT_S = 5.0
STALE_S = 60.0
"""Longer than stalls of a shared file system, shorter than an acceptable wait after a run was killed."""
POLL_S = 0.5
SETTLE_S = 1.0
"""Without file system locks: time after which one of two simultaneous writes has won."""
RECORD_BYTES = 1024
KERNEL_ID = Path("/proc/sys/kernel/random/boot_id")
PID_NAMESPACE = Path("/proc/self/ns/pid")


@dataclass(frozen=True)
class Holder:
    """The process that holds a folder."""

    token: str
    host: str
    pid: Annotated[int, Field(gt=0)]
    since: str
    kernel: str
    """Boot id: differs between nodes, and after a reboot."""
    pid_namespace: str
    """Distinguishes the containers of a node, in which equal pids mean different processes."""
    create_time: float
    """Start time of the process, because pids are reused."""
    locked: bool
    """Whether the file system has locks."""
    beat: int = 0

    @classmethod
    def own(cls) -> Holder:
        """This process."""
        process = psutil.Process()
        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            pid=process.pid,
            since=datetime.now().astimezone().isoformat(" ", "seconds"),
            kernel=KERNEL_ID.read_text().strip() if KERNEL_ID.exists() else socket.gethostname(),
            pid_namespace=os.readlink(PID_NAMESPACE) if PID_NAMESPACE.exists() else "",
            create_time=process.create_time(),
            locked=False,
        )

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} since {self.since}"


class HolderStatus(Enum):
    """Status of a holder after one check."""

    ALIVE = "alive"
    GONE = "gone"
    UNKNOWN = "its heartbeat decides"


class RunLock:
    """Holds a run folder from `acquire` to the end of the `with` block; used by one process per run.

    Args:
        root: the run folder, created if it is missing.
        on_loss: called from a thread, with a message, when another process has acquired the folder, as can happen to a
            process that was frozen; it has to end this process.
        beat_s: seconds between heartbeats.
        stale_s: seconds without a heartbeat after which a holder on another node counts as gone.
    """

    def __init__(
        self, root: Path, on_loss: Callable[[str], None], *, beat_s: float = BEAT_S, stale_s: float = STALE_S
    ) -> None:
        self._root = root
        self._path = root / LOCK_FILE
        self._on_loss = on_loss
        self._beat_s = beat_s
        self._stale_s = stale_s
        self._descriptor: int | None = None
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Acquire the folder, if necessary after waiting for the heartbeat of a holder on another node.

        Raises:
            RunFolderError: another process holds it, or it cannot be written.
        """
        self._own = Holder.own()
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._wait_and_acquire()
        except OSError as error:
            raise RunFolderError(f"output_dir: cannot write to {self._root}: {error.strerror or error}") from error
        self._thread = threading.Thread(target=self._renew_until_released, name="das-ds-run-lock", daemon=True)
        self._thread.start()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Release the folder; does nothing if it is not held."""
        self._released.set()
        if self._thread is not None:
            self._thread.join(self._beat_s)
            self._thread = None
        if self._descriptor is not None:
            with suppress(OSError):
                holder = _holder_at(self._path, self._descriptor)
                if holder is not None and holder.token == self._own.token:
                    self._path.unlink()
            os.close(self._descriptor)
            self._descriptor = None

    def _wait_and_acquire(self) -> None:
        seen: tuple[str, int] | None = None
        deadline = 0.0
        while True:
            descriptor, has_lock = _open_and_lock(self._path)
            holder = _read(descriptor)
            status = _check_holder(holder, self._own, has_lock)
            if status is HolderStatus.UNKNOWN:
                current = (holder.token, holder.beat) if holder is not None else ("", 0)
                if seen is None or current[0] != seen[0]:
                    # A new holder: wait for its next heartbeat.
                    seen = current
                    deadline = time.monotonic() + self._stale_s
                    self._report_waiting(holder)
                elif current[1] != seen[1]:
                    status = HolderStatus.ALIVE
                elif time.monotonic() > deadline:
                    status = HolderStatus.GONE
            if status is HolderStatus.GONE and self._write_as_own(descriptor, has_lock):
                return
            os.close(descriptor)
            if status is HolderStatus.ALIVE:
                raise RunFolderError(f"output_dir: {self._root} is held by another start, {holder}; wait until it ends")
            time.sleep(min(POLL_S, self._beat_s))

    def _report_waiting(self, holder: Holder | None) -> None:
        if holder is not None and holder.kernel != self._own.kernel:
            print(
                f"das_ds: output_dir: {self._root} was held by {holder}; waiting up to {self._stale_s:g} s for its "
                "next heartbeat",
                file=sys.stderr,
                flush=True,
            )

    def _write_as_own(self, descriptor: int, has_lock: bool | None) -> bool:
        """Write this process into the lock file; whether it holds the folder now."""
        if has_lock is False:
            # A node that is gone still holds the lock of this file; a new file has a new lock.
            self._path.unlink(missing_ok=True)
            return False
        self._own = replace(self._own, locked=bool(has_lock))
        _write(descriptor, self._own)
        if not has_lock:
            time.sleep(SETTLE_S)
        holder = _read(descriptor)
        if holder is None or holder.token != self._own.token or not _is_same_file(descriptor, self._path):
            return False
        self._descriptor = descriptor
        return True

    def _renew_until_released(self) -> None:
        has_warned = False
        while not self._released.wait(self._beat_s):
            try:
                if (other := self._renew()) is not None:
                    self._on_loss(f"output_dir: {self._root} was taken by another start, {other}; this one ends")
                    return
            # No error of the lock file is worth ending the run.
            except Exception as error:
                if not has_warned:
                    logger.warning(
                        "%s cannot be renewed (%s: %s); training continues, but after %g s a start on another node may "
                        "take the folder",
                        self._path,
                        type(error).__name__,
                        error,
                        self._stale_s,
                    )
                has_warned = True

    def _renew(self) -> Holder | None:
        """Write the next heartbeat; returns the holder if it is another process."""
        assert self._descriptor is not None, "renewed after acquire()"
        holder = _holder_at(self._path, self._descriptor)
        if holder is not None and holder.token != self._own.token:
            return holder
        self._own = replace(self._own, beat=self._own.beat + 1)
        if not _is_same_file(self._descriptor, self._path):
            # The file was removed, so the lock is on a file that no other process sees.
            removed = self._descriptor
            self._descriptor, has_lock = _open_and_lock(self._path)
            os.close(removed)
            self._own = replace(self._own, locked=bool(has_lock))
        _write(self._descriptor, self._own)
        return None


def current_holder(root: Path) -> Holder | None:
    """The process that holds a run folder, after a single check; None if there is none.

    On another node the age of the file replaces the heartbeat, which is a guess if clocks differ.
    """
    path = root / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        holder = _read(descriptor)
        status = _check_holder(holder, Holder.own(), _try_lock(descriptor, fcntl.LOCK_SH))
        is_fresh = time.time() - os.fstat(descriptor).st_mtime < STALE_S
    except OSError:
        # No regular file.
        return None
    finally:
        os.close(descriptor)
    is_held = status is HolderStatus.ALIVE or (status is HolderStatus.UNKNOWN and is_fresh)
    return holder if is_held else None


def _check_holder(holder: Holder | None, own: Holder, has_lock: bool | None) -> HolderStatus:
    """Status of a holder as far as it can be seen without waiting.

    Args:
        holder: named in the file; None: no process.
        own: this process.
        has_lock: whether this process has the file system's lock; None: the file system has no locks.
    """
    if holder is None:
        return HolderStatus.UNKNOWN if has_lock is False else HolderStatus.GONE
    if holder.kernel != own.kernel:
        return HolderStatus.UNKNOWN
    if holder.pid_namespace != own.pid_namespace:
        return HolderStatus.GONE if holder.locked and has_lock else HolderStatus.UNKNOWN
    if _is_running(holder):
        return HolderStatus.ALIVE
    # Another process may have the lock and be about to write its name.
    return HolderStatus.UNKNOWN if has_lock is False else HolderStatus.GONE


def _is_running(holder: Holder) -> bool:
    try:
        process = psutil.Process(holder.pid)
        is_same = abs(process.create_time() - holder.create_time) < 1.0
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _open_and_lock(path: Path) -> tuple[int, bool | None]:
    """(descriptor of the lock file, whether this process has its lock; None: the file system has no locks)."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        has_lock = _try_lock(descriptor, fcntl.LOCK_EX)
        # A holder that exits removes the file, perhaps between these two lines.
        if _is_same_file(descriptor, path):
            return descriptor, has_lock
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool | None:
    # Not flock, which child processes of a rank would keep after the rank has exited.
    try:
        fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder_at(path: Path, descriptor: int) -> Holder | None:
    """The holder named in the file at `path`, which may no longer be the one that is open."""
    if _is_same_file(descriptor, path):
        # Opening and closing it again would release this process's lock (POSIX).
        return _read(descriptor)
    try:
        other = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return _read(other)
    finally:
        os.close(other)


def _read(descriptor: int) -> Holder | None:
    """The holder named in a lock file; None if there is none, or its line is incomplete."""
    try:
        # Strict: values of wrong types name no holder.
        return TypeAdapter(Holder).validate_json(os.pread(descriptor, RECORD_BYTES, 0), strict=True)
    except ValueError:
        return None


def _write(descriptor: int, holder: Holder) -> None:
    # In place, because a new file would lose the lock; padded, so that a reader always finds a complete line.
    os.pwrite(descriptor, json.dumps(asdict(holder)).ljust(RECORD_BYTES - 1).encode() + b"\n", 0)
    os.fsync(descriptor)
