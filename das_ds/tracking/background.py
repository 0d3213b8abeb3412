"""Calls into a library that may fail or hang, on a background worker: neither reaches the training thread."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from das_ds.tracking.sinks import Metrics, Scalar, Sink

MAX_PENDING_CALLS = 10_000
CLOSE_TIMEOUT_S = 60.0

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


class BackgroundSink(Sink):
    """Forwards everything to the sink of a library, which is made and called on a background worker.

    Args:
        name: of the library.
        build: makes the sink.
        drops_steps: as that of the sink.
        close_timeout_s: longest time that `close` blocks.
        on_abandon: called if closing takes longer; returns what the user can do, for the warning.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[], Sink],
        *,
        drops_steps: bool = False,
        close_timeout_s: float = CLOSE_TIMEOUT_S,
        on_abandon: Callable[[], str] | None = None,
    ) -> None:
        self.drops_steps = drops_steps
        self._name = name
        self._close_timeout_s = close_timeout_s
        self._on_abandon = on_abandon
        self._worker = BackgroundWorker(name, max_pending=MAX_PENDING_CALLS)
        self._worker.start(build)

    # Everything is copied, because the caller may change it before the worker reads it.

    def log(self, metrics: Metrics, *, global_step: int) -> None:
        """Submit a training step."""
        copy = dict(metrics)
        self._worker.submit(lambda sink: sink.log(copy, global_step=global_step))

    def log_evaluation(self, losses: Mapping[str, float], *, domains_learned: int, global_step: int) -> None:
        """Submit held-out losses."""
        copy = dict(losses)
        self._worker.submit(
            lambda sink: sink.log_evaluation(copy, domains_learned=domains_learned, global_step=global_step)
        )

    def log_domain_evaluation(self, metrics: Metrics, *, global_step: int) -> None:
        """Submit an evaluation within a domain."""
        copy = dict(metrics)
        self._worker.submit(lambda sink: sink.log_domain_evaluation(copy, global_step=global_step))

    def log_summary(self, metrics: Metrics) -> None:
        """Submit metrics of the complete run."""
        copy = dict(metrics)
        self._worker.submit(lambda sink: sink.log_summary(copy))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Scalar]]) -> None:
        """Submit a table."""
        header = list(columns)
        copies = [list(row) for row in rows]
        self._worker.submit(lambda sink: sink.log_table(name, header, copies))

    def log_image(self, name: str, path: Path) -> None:
        """Submit a PNG file, which is read later."""
        self._worker.submit(lambda sink: sink.log_image(name, path))

    def truncate_after(self, global_step: int, num_bytes: int | None = None) -> None:
        """Submit where the run continues."""
        self._worker.submit(lambda sink: sink.truncate_after(global_step, num_bytes))

    def close(self, exit_code: int = 0) -> None:
        """Close the sink, or abandon it after the time-out."""
        self._worker.submit(lambda sink: sink.close(exit_code))
        if not self._worker.join(self._close_timeout_s):
            advice = "" if self._on_abandon is None else f"; {self._on_abandon()}"
            logger.warning(
                "%s did not finish within %g s and is abandoned%s", self._name, self._close_timeout_s, advice
            )
