"""One start at a time in a run folder, by a lock that no killed process can leave behind.

The file `run.lock` names the process that holds the folder and carries its heartbeat, a number that grows every few
seconds. Whether a holder still lives is seen by the surest sign there is:

1. On the holder's node, whether its process is there; from another container of that node, the lock of the file system
   (`fcntl.lockf`), which ends with its process.
2. On any other node, or where the file system has no locks, its heartbeat: one that stands still for `STALE_S` seconds
   is that of a process that was killed or of a node that is gone. Numbers are compared, not times, so that clocks may
   differ.
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
"""Longer than a shared file system stalls, shorter than anybody wants to wait for a run that was killed."""
POLL_S = 0.5
SETTLE_S = 1.0
"""Where the file system has no locks: what two starts write at the same time is one of them after this."""
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
    """Differs between nodes, and after a node has started anew."""
    pid_namespace: str
    """Containers on one node see other processes under the same number."""
    create_time: float
    """Of the process: a number is given again to another one."""
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


class Sign(Enum):
    """What is known of a holder at one look."""

    ALIVE = "alive"
    GONE = "gone"
    UNKNOWN = "its heartbeat has to be watched"


class RunLock:
    """Holds a run folder between `with` and its end; one process per run does so.

    Args:
        root: the run folder, made where it is missing.
        on_loss: called with a message, from a thread, when another process has taken the folder all the same, as may
            happen to a process that was frozen; two must not go on.
        beat_s, stale_s: seconds between heartbeats, and without one until a holder elsewhere counts as gone.
    """

    def __init__(
        self, root: Path, on_loss: Callable[[str], None], *, beat_s: float = BEAT_S, stale_s: float = STALE_S
    ) -> None:
        self._root, self._path, self._on_loss = root, root / LOCK_FILE, on_loss
        self._beat_s, self._stale_s = beat_s, stale_s
        self._descriptor: int | None = None
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the folder, if need be after waiting for the heartbeat of a holder elsewhere.

        Raises:
            RunFolderError: another process holds it, or it cannot be written.
        """
        self._own = Holder.own()
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._take()
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
        """Let others in; nothing is done where the folder is not held."""
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

    def _take(self) -> None:
        seen: tuple[str, int] | None = None
        deadline = 0.0
        while True:
            descriptor, has_lock = _opened(self._path)
            holder = _read(descriptor)
            sign = _sign(holder, self._own, has_lock)
            if sign is Sign.UNKNOWN:
                now = (holder.token, holder.beat) if holder is not None else ("", 0)
                if seen is None or now[0] != seen[0]:
                    seen, deadline = now, time.monotonic() + self._stale_s
                    self._say_waiting(holder)
                elif now[1] != seen[1]:
                    sign = Sign.ALIVE
                elif time.monotonic() > deadline:
                    sign = Sign.GONE
            if sign is Sign.GONE and self._write_as_own(descriptor, has_lock):
                return
            os.close(descriptor)
            if sign is Sign.ALIVE:
                raise RunFolderError(f"output_dir: {self._root} is held by another start, {holder}; wait until it ends")
            time.sleep(min(POLL_S, self._beat_s))

    def _say_waiting(self, holder: Holder | None) -> None:
        if holder is not None and holder.kernel != self._own.kernel:
            print(
                f"das_ds: output_dir: {self._root} was held by {holder}; waiting up to {self._stale_s:g} s for a sign "
                "of its life",
                file=sys.stderr,
                flush=True,
            )

    def _write_as_own(self, descriptor: int, has_lock: bool | None) -> bool:
        """Whether the folder is this process's now."""
        if has_lock is False:
            # Held on by a node that is gone: a new file has a lock of its own.
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
            # Whatever goes wrong with a file, the run does not end of it.
            except Exception as error:
                if not has_warned:
                    logger.warning(
                        "%s cannot be renewed (%s: %s); training goes on, but after %g s a start on another node may "
                        "take the folder",
                        self._path,
                        type(error).__name__,
                        error,
                        self._stale_s,
                    )
                has_warned = True

    def _renew(self) -> Holder | None:
        """Write the next heartbeat; gives the holder where it is another one."""
        assert self._descriptor is not None, "renewed after acquire()"
        holder = _holder_at(self._path, self._descriptor)
        if holder is not None and holder.token != self._own.token:
            return holder
        self._own = replace(self._own, beat=self._own.beat + 1)
        if not _is_same_file(self._descriptor, self._path):
            # Somebody removed the file, and with it what keeps others out.
            former, (self._descriptor, has_lock) = self._descriptor, _opened(self._path)
            os.close(former)
            self._own = replace(self._own, locked=bool(has_lock))
        _write(self._descriptor, self._own)
        return None


def current_holder(root: Path) -> Holder | None:
    """The process that holds a run folder, by one look; None where none does.

    A heartbeat on another node counts by the age of the file, which is a guess where clocks differ.
    """
    path = root / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        holder = _read(descriptor)
        sign = _sign(holder, Holder.own(), _locked(descriptor, fcntl.LOCK_SH))
        is_fresh = time.time() - os.fstat(descriptor).st_mtime < STALE_S
    finally:
        os.close(descriptor)
    return holder if sign is Sign.ALIVE or (sign is Sign.UNKNOWN and is_fresh) else None


def _sign(holder: Holder | None, own: Holder, has_lock: bool | None) -> Sign:
    """What one look tells.

    Args:
        holder: named in the file; None: nobody.
        own: this process.
        has_lock: whether this process has the file system's lock; None: the file system has none.
    """
    if holder is None:
        return Sign.UNKNOWN if has_lock is False else Sign.GONE
    if holder.kernel != own.kernel:
        return Sign.UNKNOWN
    if holder.pid_namespace != own.pid_namespace:
        return Sign.GONE if holder.locked and has_lock else Sign.UNKNOWN
    if _is_running(holder):
        return Sign.ALIVE
    # Somebody else may have the lock and be about to write who.
    return Sign.UNKNOWN if has_lock is False else Sign.GONE


def _is_running(holder: Holder) -> bool:
    try:
        process = psutil.Process(holder.pid)
        is_same = abs(process.create_time() - holder.create_time) < 1.0
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _opened(path: Path) -> tuple[int, bool | None]:
    """The lock file, made where it is missing, and whether this process has its lock (None: there are no locks)."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        has_lock = _locked(descriptor, fcntl.LOCK_EX)
        # A holder that ends removes the file, perhaps between these two lines.
        if _is_same_file(descriptor, path):
            return descriptor, has_lock
        os.close(descriptor)


def _locked(descriptor: int, kind: int) -> bool | None:
    # Not flock: processes that a rank has forked would keep it after the rank's end.
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
    """Who is named under a path, which may be another file than the one that is open."""
    if _is_same_file(descriptor, path):
        # To open and close it once more would end this process's lock.
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
    """Who is named in a lock file; None: nobody, or half a line of one who is being written."""
    try:
        # Values of other types than a lock has are nobody's.
        return TypeAdapter(Holder).validate_json(os.pread(descriptor, RECORD_BYTES, 0), strict=True)
    except ValueError:
        return None


def _write(descriptor: int, holder: Holder) -> None:
    # In place and at one length: a new file would lose the lock, and a reader sees the line whole.
    os.pwrite(descriptor, json.dumps(asdict(holder)).ljust(RECORD_BYTES - 1).encode() + b"\n", 0)
    os.fsync(descriptor)
