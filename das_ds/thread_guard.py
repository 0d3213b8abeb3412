"""Thread guard: logs errors of background threads, which would otherwise die silently."""

from __future__ import annotations

import logging
from types import TracebackType

logger = logging.getLogger(__name__)


class ThreadGuard:
    """`with guard:` around one task of a background thread: an error is logged and ends the task, not the thread.

    Only the first error is logged, with its traceback: a task that is repeated every second would fill the log.

    Args:
        message: which task failed, and the consequence for the run.
    """

    def __init__(self, message: str) -> None:
        self._message = message
        self._was_logged = False
        self.has_failed = False
        """Whether the last task failed."""

    def __enter__(self) -> ThreadGuard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        # SystemExit too: in a thread it would silently end only that thread.
        self.has_failed = error is not None
        if error is not None and not self._was_logged:
            self._was_logged = True
            logger.error("%s; further errors of this kind are not shown", self._message, exc_info=error)
        return True
