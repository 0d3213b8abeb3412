"""Waiting in tests for what another process or thread does."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(is_true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until something is true.

    Raises:
        AssertionError: it was not in time.
    """
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "time ran out"
        time.sleep(0.02)
