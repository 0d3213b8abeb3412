"""Learning rates of every schedule against their closed forms."""

from collections.abc import Callable
from math import cos, pi, sqrt
from typing import Any

import pytest
import torch

from das_ds.config import TrainConfig
from das_ds.engine.lr_scheduler import build_lr_scheduler

PEAK = 0.5
NUM_STEPS = 20
WARMUP = 4
DECAY = 10
"""Steps of the two at the ratios below."""


def rates(
    schedule: str, *, is_first: bool = True, is_last: bool = True, num_steps: int = NUM_STEPS, **train: Any
) -> list[float]:
    """The rate of each step, as an optimizer that is stepped sees it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], PEAK)
    config = TrainConfig.model_validate({"lr_scheduler": schedule, "warmup_ratio": 0.2, "decay_ratio": 0.5, **train})
    scheduler = build_lr_scheduler(optimizer, config, num_steps, is_first=is_first, is_last=is_last)
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def rising(step: int) -> float:
    return min(step / WARMUP, 1.0)


def falling(step: int) -> float:
    return 1.0 - sqrt(max(0, step - (NUM_STEPS - DECAY)) / DECAY)


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("linear", lambda step: min(rising(step), (NUM_STEPS - step) / (NUM_STEPS - WARMUP))),
        (
            "cosine",
            lambda step: rising(step) if step < WARMUP else (1 + cos(pi * (step - WARMUP) / (NUM_STEPS - WARMUP))) / 2,
        ),
        ("constant_with_warmup", rising),
        ("wsd", lambda step: rising(step) * falling(step)),
    ],
)
@pytest.mark.parametrize(("is_first", "is_last"), [(True, False), (False, False), (False, True)])
def test_lr_scheduler_restarts_for_each_domain(
    schedule: str, factor: Callable[[int], float], is_first: bool, is_last: bool
) -> None:
    expected = [PEAK * factor(step) for step in range(NUM_STEPS)]
    assert rates(schedule, is_first=is_first, is_last=is_last) == pytest.approx(expected)


def test_infinite_scheduler_spans_all_domains() -> None:
    first, second, third = (
        rates("infinite", is_first=is_first, is_last=is_last)
        for is_first, is_last in ((True, False), (False, False), (False, True))
    )
    assert first == pytest.approx([PEAK * rising(step) for step in range(NUM_STEPS)])
    assert second == [PEAK] * NUM_STEPS
    assert third == pytest.approx([PEAK * falling(step) for step in range(NUM_STEPS)])
    assert rates("infinite") == rates("wsd")


def test_lr_scheduler_rounded_phases_fit_domain() -> None:
    # Half of three steps is rounded to two, twice.
    assert rates("wsd", num_steps=3, warmup_ratio=0.5) == pytest.approx([0.0, PEAK / 2, PEAK])
    assert rates("wsd", num_steps=3, warmup_ratio=0.0, decay_ratio=0.0) == [PEAK] * 3


@pytest.mark.parametrize("minimum", [0.1, 0.25, 1.0])
@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("linear", lambda step: (NUM_STEPS - step) / (NUM_STEPS - WARMUP)),
        ("cosine", lambda step: (1 + cos(pi * (step - WARMUP) / (NUM_STEPS - WARMUP))) / 2),
        ("constant_with_warmup", lambda step: 1.0),
        ("wsd", falling),
        ("infinite", falling),
    ],
)
def test_lr_scheduler_falls_to_the_minimum(schedule: str, factor: Callable[[int], float], minimum: float) -> None:
    """The warm-up still begins at 0, and the rest falls from the peak to its part of the peak."""
    found = rates(schedule, min_lr_ratio=minimum)
    expected = [
        PEAK * (step / WARMUP if step < WARMUP else minimum + (1 - minimum) * factor(step)) for step in range(NUM_STEPS)
    ]
    assert found == pytest.approx(expected)
    assert min(found[WARMUP:]) >= PEAK * minimum


def test_infinite_scheduler_falls_to_the_minimum_in_the_last_domain_only() -> None:
    first, last = (
        rates("infinite", is_first=is_first, is_last=not is_first, min_lr_ratio=0.25) for is_first in (True, False)
    )
    assert first == pytest.approx([PEAK * rising(step) for step in range(NUM_STEPS)])
    assert last == pytest.approx([PEAK * (0.25 + 0.75 * falling(step)) for step in range(NUM_STEPS)])
    assert last[0] == PEAK
