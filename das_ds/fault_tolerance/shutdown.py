"""Shutdown handler: collects requests to stop or save, from signals, files, or the end of the launcher."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from das_ds.errors import RunFolderError
from das_ds.fault_tolerance.launcher_guard import LauncherGuard, find_launchers, is_alive
from das_ds.run_dir import STOP_FILE, RunDir

INSIST_AFTER_S = 2.0
"""A second Ctrl-C after this time interrupts at once; launchers repeat the first one sooner."""
LAUNCHER_CHECK_S = 1.0
SUSPEND_LIMIT_S = 3600.0
"""Longest time for which the launcher is kept from killing ranks that save."""


@dataclass(frozen=True)
class ShutdownRequest:
    """The requests to be served at a save point."""

    stop: str | None
    """Why it should save and stop; None: it should continue."""
    save: bool
    """Whether it should save and continue."""


class ShutdownHandler:
    """Collects requests inside its `with` block; acting on them is the caller's task.

    Args:
        run_dir: where the files `STOP` and `SAVE` may appear.
        signals: names of the signals that ask for a stop.
        suspend_limit_s: longest time for which DeepSpeed's launcher is suspended while ranks save.
    """

    def __init__(self, run_dir: RunDir, signals: Sequence[str], *, suspend_limit_s: float = SUSPEND_LIMIT_S) -> None:
        self._stop_file = run_dir.stop_file
        self._save_file = run_dir.save_file
        self._signals = [signal.Signals[name] for name in signals]
        self._launchers = find_launchers()
        self._suspend_limit_s = suspend_limit_s
        self._reason: str | None = None
        self._first_interrupt: float | None = None
        self._next_check = 0.0
        self._seen_save_time: int | None = None
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> ShutdownHandler:
        # Installed even where a parent process made the signal ignored, as it does to outlive the signal itself.
        self._previous_handlers = {number: signal.signal(number, self._handle) for number in self._signals}
        self._guard = LauncherGuard(self._launchers, self._suspend_limit_s)
        return self

    def __exit__(self, *_: object) -> None:
        self._guard.close()
        for number, handler in self._previous_handlers.items():
            # None: a handler that was not installed from Python and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def poll(self, *, files: bool) -> ShutdownRequest:
        """The current requests.

        Args:
            files: whether to look for files, which one rank does for all.
        """
        self._check_launchers()
        if files and self._reason is None and self._stop_file.exists():
            self._reason = f"the file {STOP_FILE}"
        return ShutdownRequest(stop=self._reason, save=files and self._has_new_save_file())

    def remove_stop_file(self) -> None:
        """Remove `STOP`: the run stops, and the same command is to resume it."""
        _remove(self._stop_file)

    def remove_save_file(self) -> None:
        """Remove `SAVE` after a checkpoint, unless it was written again meanwhile, which asks for another one."""
        if self._seen_save_time is not None and self._save_file_time() == self._seen_save_time:
            _remove(self._save_file)

    def _has_new_save_file(self) -> bool:
        # Compared by time: one file is one request, however often it is polled before it is removed.
        written = self._save_file_time()
        is_new = written is not None and written != self._seen_save_time
        if is_new:
            self._seen_save_time = written
        return is_new

    def _save_file_time(self) -> int | None:
        try:
            return self._save_file.stat().st_mtime_ns
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
