"""How fast and how large a run is: tokens per second between two log lines, and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

GIB = 2**30


class Throughput:
    """Tokens per second of training over the interval since the rate was last taken, pauses left out."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Start a new interval now, with no tokens."""
        self._num_tokens = 0
        self._paused_seconds = 0.0
        self._start = self._clock()

    def add(self, num_tokens: int) -> None:
        """Count tokens of all ranks as processed."""
        self._num_tokens += num_tokens

    def take(self) -> float:
        """Tokens per second since the last `take` or `restart`, 0 where no time has passed; starts a new interval."""
        seconds = self._clock() - self._start - self._paused_seconds
        rate = self._num_tokens / seconds if seconds > 0 else 0.0
        self.restart()
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of this block (evaluation, checkpoints) out of the interval; no `take` within it."""
        begin = self._clock()
        try:
            yield
        finally:
            self._paused_seconds += self._clock() - begin


def peak_memory_gib() -> float:
    """Largest memory so far in GiB: allocated by torch on the GPU where there is one, else resident in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
