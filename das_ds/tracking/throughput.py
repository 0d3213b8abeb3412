"""Throughput meter: tokens per second between two log lines; and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

GIB = 2**30


class Throughput:
    """Tokens per second of training since the last `pop_rate`, excluding pauses."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Start a new interval now, with no tokens."""
        self._num_tokens = 0
        self._paused_seconds = 0.0
        self._start = self._clock()

    def add(self, num_tokens: int) -> None:
        """Count processed tokens of all ranks."""
        self._num_tokens += num_tokens

    def pop_rate(self) -> float:
        """Tokens per second of this interval, 0 if no time has passed; starts a new interval."""
        seconds = self._clock() - self._start - self._paused_seconds
        rate = self._num_tokens / seconds if seconds > 0 else 0.0
        self.restart()
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of this block (evaluation, checkpoints); `pop_rate` must not be called within it."""
        begin = self._clock()
        try:
            yield
        finally:
            self._paused_seconds += self._clock() - begin


def peak_memory_gib() -> float:
    """Peak memory so far in GiB: allocated by torch on the GPU or, without one, resident in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    # ru_maxrss is in bytes on macOS and in KiB on Linux.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
