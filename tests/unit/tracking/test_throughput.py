"""Throughput meter with a manual clock."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest
import torch

from das_ds.tracking.throughput import GIB, Rate, Throughput, Utilization, peak_memory_gib


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
    assert meter.pop_rate().tokens_per_s == 250.0
    meter.add(60)
    clock.seconds += 2.0
    assert meter.pop_rate().tokens_per_s == 30.0


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
    assert meter.pop_rate().tokens_per_s == 50.0
    meter.add(10)
    clock.seconds += 1.0
    assert meter.pop_rate().tokens_per_s == 10.0


def test_restart_drops_tokens_and_time() -> None:
    clock = Clock()
    meter = Throughput(clock)
    meter.add(100)
    clock.seconds += 9.0
    meter.restart()
    assert meter.pop_rate().tokens_per_s == 0.0
    meter.add(5)
    clock.seconds += 1.0
    assert meter.pop_rate().tokens_per_s == 5.0


def test_waiting_for_data_is_a_fraction_of_the_time_without_pauses() -> None:
    clock = Clock()
    meter = Throughput(clock)

    def batches() -> Iterator[int]:
        for number in range(3):
            clock.seconds += 1.0
            yield number

    for number in meter.waiting_for(batches()):
        clock.seconds += 3.0
        meter.add(8)
        with meter.paused():
            clock.seconds += 50.0
        if number == 1:
            assert meter.pop_rate() == Rate(tokens_per_s=2.0, data_wait=0.25)
    assert meter.pop_rate() == Rate(tokens_per_s=2.0, data_wait=0.25)


def test_utilization_divides_model_flops_by_the_peak_of_all_devices() -> None:
    # 1e5 tokens/s of 6 FLOPs for each of 1e9 weights on 4 devices of 1000 TFLOP/s.
    found = Utilization(6e9, 4, 1e15).metrics(1e5)
    assert found == {"model_tflops": pytest.approx(150.0), "mfu": pytest.approx(0.15)}
    assert Utilization(6e9, 4, None).metrics(1e5).keys() == {"model_tflops"}


def test_peak_memory_is_at_least_current_memory() -> None:
    now = torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    # The kernel adds up resident pages in batches, so the two counters may differ by a little.
    assert 0.98 * now / GIB <= peak_memory_gib() < 2**20
