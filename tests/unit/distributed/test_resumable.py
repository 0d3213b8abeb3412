"""Loops over batches that are saved between two batches and resumed."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from das_ds.distributed.resumable import ResumableLoop, ResumableLoops
from das_ds.distributed.state import ComponentState

NUMBERS = [3.0, 1.0, 4.0, 1.5, 9.0]


class InterruptedLoopError(Exception):
    """Raised between two batches."""


def saved_state(state: ComponentState, *, is_same_sharding: bool = True) -> Any:
    """A state as a checkpoint gives it back."""
    tensors = state.rank_local if is_same_sharding else {}
    return SimpleNamespace(metadata=json.loads(json.dumps(state.metadata)), rank_local=lambda: tensors)


def noisy_sum(loop: ResumableLoop[float]) -> float:
    """Sum of all numbers plus noise; continues from the loop's accumulators."""
    total = loop.accumulators.setdefault("total", torch.zeros(1, dtype=torch.float64))
    for number in loop:
        total += number + torch.rand(1, dtype=torch.float64)
    return float(total)


def interrupted_state(num_batches: int) -> ComponentState:
    """State of loops of which one is interrupted after some batches."""
    states: list[ComponentState] = []

    def on_batch_end() -> None:
        if loops.num_batches == num_batches:
            states.append(loops.state_dict())
            raise InterruptedLoopError

    loops = ResumableLoops(on_batch_end, show_progress=False)
    torch.manual_seed(0)
    with pytest.raises(InterruptedLoopError):
        noisy_sum(loops.start(NUMBERS, "sum"))
    return states[0]


@pytest.mark.parametrize("num_batches", range(1, len(NUMBERS)))
def test_resumable_loop_resumed_equals_uninterrupted(num_batches: int) -> None:
    torch.manual_seed(0)
    expected = noisy_sum(ResumableLoop(NUMBERS))
    loops = ResumableLoops(show_progress=False)
    loops.load_state_dict(saved_state(interrupted_state(num_batches)))
    torch.manual_seed(1)
    loop = loops.start(NUMBERS, "sum")
    assert loop.num_done == num_batches
    assert noisy_sum(loop) == expected


def test_resumable_loop_with_other_sharding_starts_over() -> None:
    loops = ResumableLoops(show_progress=False)
    loops.load_state_dict(saved_state(interrupted_state(2), is_same_sharding=False))
    assert loops.start(NUMBERS, "sum").num_done == 0


def test_resumable_loops_reset_forgets_saved_loops() -> None:
    loops = ResumableLoops(show_progress=False)
    loops.load_state_dict(saved_state(interrupted_state(2)))
    loops.reset()
    assert loops.start(NUMBERS, "sum").num_done == 0
    assert loops.state_dict() == ComponentState(metadata={"done": []})
