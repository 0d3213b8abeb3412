"""Timing of several implementations of the same work, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def now(device: torch.device) -> float:
    """The clock, after all work queued on the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def fastest_in_turns(
    forms: dict[str, Callable[[], object]], device: torch.device, *, repeats: int, warm_up: int = 2
) -> dict[str, float]:
    """Seconds of the fastest call of each form; called in turns, so that other load affects all forms alike."""
    seconds = dict.fromkeys(forms, float("inf"))
    for round_number in range(warm_up + repeats):
        for name, form in forms.items():
            start = now(device)
            form()
            elapsed = now(device) - start
            if round_number >= warm_up:
                seconds[name] = min(seconds[name], elapsed)
    return seconds
