"""Helper threads that do not die without a word."""

from __future__ import annotations

import logging
from types import TracebackType

logger = logging.getLogger(__name__)


class ThreadGuard:
    """`with guard:` around one task of a helper thread: an error is logged and ends the task, but not the thread.

    The first error is logged with its traceback; those that follow are not, as a task that is repeated every second
    would fill the log.

    Args:
        message: what failed, and what that means for the run.
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
        # SystemExit too: in a thread it would end the thread alone, and silently.
        self.has_failed = error is not None
        if error is not None and not self._was_logged:
            self._was_logged = True
            logger.error("%s; further errors of this kind are not shown", self._message, exc_info=error)
        return True
