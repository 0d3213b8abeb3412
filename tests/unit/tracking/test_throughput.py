"""Throughput meter with a manual clock."""

from __future__ import annotations

import psutil
import pytest
import torch

from das_ds.tracking.throughput import GIB, Throughput, peak_memory_gib


class Clock:
    """A clock that is advanced by hand."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_pop_rate_restarts_the_interval() -> None:
    clock = Clock()
    meter = Throughput(clock)
    meter.add(300)
    meter.add(700)
    clock.seconds += 4.0
    assert meter.pop_rate() == 250.0
    meter.add(60)
    clock.seconds += 2.0
    assert meter.pop_rate() == 30.0


def test_paused_time_is_excluded_even_on_error() -> None:
    clock = Clock()
    meter = Throughput(clock)
    meter.add(100)
    clock.seconds += 1.0
    with pytest.raises(KeyError), meter.paused():
        clock.seconds += 50.0
        raise KeyError
    with meter.paused():
        clock.seconds += 50.0
    clock.seconds += 1.0
    assert meter.pop_rate() == 50.0
    meter.add(10)
    clock.seconds += 1.0
    assert meter.pop_rate() == 10.0


def test_restart_drops_tokens_and_time() -> None:
    clock = Clock()
    meter = Throughput(clock)
    meter.add(100)
    clock.seconds += 9.0
    meter.restart()
    assert meter.pop_rate() == 0.0
    meter.add(5)
    clock.seconds += 1.0
    assert meter.pop_rate() == 5.0


def test_peak_memory_is_at_least_current_memory() -> None:
    now = torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    # The kernel adds up resident pages in batches, so the two counters may differ by a little.
    assert 0.98 * now / GIB <= peak_memory_gib() < 2**20
