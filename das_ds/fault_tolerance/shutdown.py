"""What this rank has been asked for: to stop, or to save and go on. Signals, files, and a launcher that is gone."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from das_ds.errors import RunFolderError
from das_ds.fault_tolerance.launcher_guard import DEEPSPEED_LAUNCH, is_alive, launchers, program, suspend_launcher
from das_ds.run_dir import SAVE_FILE, STOP_FILE
from das_ds.thread_guard import ThreadGuard

ENDING_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})
"""Those that end a launcher, which then ends its ranks."""
INSIST_AFTER_S = 2.0
"""A second Ctrl-C that comes later than this is a user who does not want to wait; launchers repeat the first sooner."""
LAUNCHER_CHECK_S = 1.0
LAUNCHER_PAUSE_S = 3600.0
"""Longest time for which the launcher is kept from killing ranks that save."""


@dataclass(frozen=True)
class Request:
    """What is wanted from the run at one boundary."""

    stop: str | None
    """Why it should stop; None: it should go on."""
    save: bool
    """A checkpoint is wanted, after which the run goes on."""


class ShutdownHandler:
    """Collects requests between `with` and its end; nothing is done about them here.

    Args:
        folder: run folder, in which the files `STOP` and `SAVE` are looked for.
        signals: names of the signals that ask for a stop.
        launcher_pause_s: longest time for which a DeepSpeed launcher that ends is held up by ranks that save.
    """

    def __init__(self, folder: Path, signals: Sequence[str], *, launcher_pause_s: float = LAUNCHER_PAUSE_S) -> None:
        self._folder = folder
        self._signals = [signal.Signals[name] for name in signals]
        self._launchers = launchers()
        self._launcher_pause_s = launcher_pause_s
        self._reason: str | None = None
        self._first_interrupt: float | None = None
        self._next_check = 0.0
        self._seen_save: int | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> ShutdownHandler:
        # Also where a parent has made the signal ignored: launchers that must outlive it are started in that way.
        self._former = {number: signal.signal(number, self._handle) for number in self._signals}
        self._guard = LauncherGuard(self._launchers, self._launcher_pause_s)
        return self

    def __exit__(self, *_: object) -> None:
        self._guard.close()
        for number, handler in self._former.items():
            # None: a handler that was not installed from Python, which cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def poll(self, *, files: bool) -> Request:
        """What is wanted now.

        Args:
            files: whether to look for files too, which one rank does for all.
        """
        self._check_launchers()
        if files and self._reason is None and (self._folder / STOP_FILE).exists():
            self._reason = f"the file {STOP_FILE}"
        return Request(self._reason, files and self._finds_save())

    def remove_stop_file(self) -> None:
        """The run stops: the same command is to go on."""
        _remove(self._folder / STOP_FILE)

    def remove_save_file(self) -> None:
        """A checkpoint is saved; a file that was written anew in the meantime asks for another one."""
        if self._seen_save is not None and self._save_file_time() == self._seen_save:
            _remove(self._folder / SAVE_FILE)

    def _finds_save(self) -> bool:
        # One file is one request, however many boundaries pass until it is removed.
        written = self._save_file_time()
        is_new = written is not None and written != self._seen_save
        if is_new:
            self._seen_save = written
        return is_new

    def _save_file_time(self) -> int | None:
        try:
            return (self._folder / SAVE_FILE).stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _check_launchers(self) -> None:
        now = time.monotonic()
        if self._reason is not None or now < self._next_check:
            return
        self._next_check = now + LAUNCHER_CHECK_S
        for launcher in self._launchers:
            if not is_alive(launcher):
                self._reason = f"the launcher (pid {launcher.pid}) is gone"
                return

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._first_interrupt is None:
                self._first_interrupt = now
            elif now - self._first_interrupt >= INSIST_AFTER_S:
                raise KeyboardInterrupt
        if self._reason is None:
            self._reason = signal.Signals(number).name


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be removed ({error.strerror}); remove it by hand") from error


class LauncherGuard:
    """Pauses the DeepSpeed launcher as soon as SIGTERM or SIGINT arrives, even while Python waits for the step.

    Python's handlers run between two of its instructions, and a step may take longer than the launcher waits. But the
    number of a signal is written to the wake-up descriptor at once, where a thread reads it. One rank per node does so.
    """

    def __init__(self, ancestors: Sequence[Any], limit_s: float) -> None:
        self._launcher = next((one for one in ancestors if program(one.cmdline()) == DEEPSPEED_LAUNCH), None)
        self._limit_s = limit_s
        self._num_ranks = int(os.environ.get("LOCAL_SIZE", "1"))
        self._is_on = self._launcher is not None and os.environ.get("LOCAL_RANK") == "0"
        if self._is_on:
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._former = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._run, name="launcher-guard", daemon=True).start()

    def close(self) -> None:
        if self._is_on:
            signal.set_wakeup_fd(self._former)
            self._writer.close()

    def _run(self) -> None:
        # Inherited by the process that pauses: launchers and SLURM signal all that a rank has started, and if it ended
        # early the launcher would remain stopped.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        guard = ThreadGuard("the launcher cannot be paused: it may kill ranks before they have saved")
        with guard, self._reader:
            while numbers := self._reader.recv(64):
                if ENDING_SIGNALS & set(numbers):
                    suspend_launcher(self._launcher, self._num_ranks, self._limit_s)
                    return
