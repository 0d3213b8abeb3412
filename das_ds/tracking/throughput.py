"""Throughput meter: tokens per second and waiting for data between two log lines; FLOP/s; and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from das_ds.tracking.device_peak import TERA
from das_ds.tracking.names import MFU, MODEL_TFLOPS

GIB = 2**30

T = TypeVar("T")


@dataclass(frozen=True)
class Rate:
    """Speed of training in an interval."""

    tokens_per_s: float
    """Of all ranks."""
    data_wait: float
    """Fraction of the time that this rank waited for batches."""


@dataclass(frozen=True)
class Utilization:
    """Turns a speed into FLOP/s, and into model FLOPs utilization (MFU).

        MFU = tokens/s * FLOPs per token / (devices * peak FLOP/s)        (Chowdhery et al., *PaLM*, 2022, appendix B)

    FLOPs are those that plain training of the tokens needs: recomputation, further views and masks do not count.
    """

    flops_per_token: float
    num_devices: int
    peak: float | None
    """FLOP/s of a device by its data sheet; None: unknown."""

    def metrics(self, tokens_per_s: float) -> dict[str, float]:
        """Model TFLOP/s of a device, and MFU where the peak is known."""
        flops = tokens_per_s * self.flops_per_token / self.num_devices
        metrics = {MODEL_TFLOPS: flops / TERA}
        return metrics if self.peak is None else {**metrics, MFU: flops / self.peak}


class Throughput:
    """Tokens per second of training since the last `pop_rate`, excluding pauses."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Start a new interval now, with no tokens."""
        self._num_tokens = 0
        self._paused_seconds = 0.0
        self._waiting_seconds = 0.0
        self._start = self._clock()

    def add(self, num_tokens: int) -> None:
        """Count processed tokens of all ranks."""
        self._num_tokens += num_tokens

    def pop_rate(self) -> Rate:
        """Speed of this interval, 0 if no time has passed; starts a new interval."""
        seconds = self._clock() - self._start - self._paused_seconds
        rate = Rate(self._num_tokens / seconds, self._waiting_seconds / seconds) if seconds > 0 else Rate(0.0, 0.0)
        self.restart()
        return rate

    def waiting_for(self, items: Iterable[T]) -> Iterator[T]:
        """The items, while the time that each takes to arrive is counted as waiting."""
        iterator = iter(items)
        while True:
            begin = self._clock()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._waiting_seconds += self._clock() - begin
            yield item

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
