"""Background worker for calls into a library that may fail or hang: neither reaches the thread that submits them."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

Call = Callable[[Any], object]


class BackgroundWorker:
    """Runs calls one after another on a daemon thread, behind a bounded queue.

    A call that raises is dropped. A call that hangs fills the queue, and calls beyond its size are dropped. The first
    failure of either kind is logged as a warning.

    Args:
        name: of the library, for the thread and the warning.
        max_pending: size of the queue.
    """

    def __init__(self, name: str, *, max_pending: int) -> None:
        self._name = name
        self._has_warned = False
        self._queue: queue.Queue[Call | None] = queue.Queue(max_pending)
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self, setup: Callable[[], Any]) -> None:
        """Start the thread.

        Args:
            setup: called first; its result is the argument of every call. If it fails, all calls are dropped.
        """
        self._setup = setup
        self._thread.start()

    def submit(self, call: Call) -> None:
        """Queue a call without blocking."""
        self._put(call)

    def join(self, timeout_s: float) -> bool:
        """Wait for all calls submitted so far, and end the thread.

        Returns:
            Whether they finished in time.
        """
        self._put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def guard(self, what: str, function: Callable[[], T]) -> T | None:
        """The result of a function; None, with a warning, if it raises."""
        try:
            return function()
        except (Exception, SystemExit) as error:
            # SystemExit would end the thread, and with it all pending calls.
            self._warn_once(what, error)
            return None

    def _put(self, call: Call | None) -> None:
        try:
            self._queue.put_nowait(call)
        except queue.Full as error:
            self._warn_once("queue", error)

    def _work(self) -> None:
        target = self.guard("init", self._setup)
        for call in iter(self._queue.get, None):
            if target is not None:
                self.guard("call", partial(call, target))

    def _warn_once(self, what: str, error: BaseException) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        # The trace of a full queue says nothing.
        trace = None if isinstance(error, queue.Full) else error
        logger.warning(
            "%s %s failed (%s); training continues, further failures are not shown",
            self._name,
            what,
            reason,
            exc_info=trace,
        )
