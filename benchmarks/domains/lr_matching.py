"""Naive training with its learning rate lowered until it learns as much as another variant does.

A run that learns less also forgets less. Protection has to beat that: where it learns domains 2..T as well, it must
forget less. The first domain does not count: nothing is forgotten by learning it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

LOWEST = 1 / 32
"""Rates below this times the one that learns best are not searched."""


@dataclass(frozen=True)
class Probe:
    """A learning rate and the mean loss when learned on domains 2..T that it gave, over all seeds."""

    learning_rate: float
    learned: float


@dataclass(frozen=True)
class Match:
    """What the search for one variant came to."""

    label: str
    """The variant that is matched."""
    target: float
    """Its mean loss when learned on domains 2..T, over all seeds."""
    tolerance: float
    probes: tuple[Probe, ...]
    """Every rate that is known, those tried for this match last."""

    @property
    def best(self) -> Probe:
        """The nearest."""
        return min(self.probes, key=lambda probe: abs(probe.learned - self.target))

    @property
    def is_met(self) -> bool:
        """Whether the nearest is near enough."""
        return abs(self.best.learned - self.target) <= self.tolerance

    @property
    def needs_lowering(self) -> bool:
        """Whether the variant learns less than naive training at its best known rate."""
        return self.target > min(probe.learned for probe in self.probes)


def match(
    label: str,
    target: float,
    known: list[Probe],
    learned_at: Callable[[float], float],
    *,
    tolerance: float,
    max_probes: int,
) -> Match:
    """Narrow the bracket around the target in log learning rate, where the loss is nearly a line.

    The next rate is where the line through the ends of the bracket meets the target (regula falsi), kept away from the
    ends by a tenth of the bracket, so that it narrows as bisection would.

    Args:
        label, target: of the variant.
        known: rates that were run already, at least one.
        learned_at: runs a rate and returns its mean loss when learned on domains 2..T.
        tolerance: nats; the search ends where a rate is as near as that.
        max_probes: rates to run at most.
    """
    found = Match(label, target, tolerance, tuple(known))
    for _ in range(max_probes):
        if found.is_met or not found.needs_lowering:
            break
        rate = next_rate(found.probes, target)
        if rate is None:
            break
        found = Match(label, target, tolerance, (*found.probes, Probe(rate, learned_at(rate))))
    return found


def next_rate(probes: tuple[Probe, ...], target: float) -> float | None:
    """The rate to try; None where even the lowest would learn too much.

    Args:
        probes: at least one of them learns more than the target, which is a smaller loss.
        target: mean loss when learned on domains 2..T.
    """
    upper = min((probe for probe in probes if probe.learned < target), key=lambda probe: probe.learning_rate)
    lower = max(
        (probe for probe in probes if probe.learned >= target and probe.learning_rate < upper.learning_rate),
        key=lambda probe: probe.learning_rate,
        default=None,
    )
    if lower is None:
        lowest = LOWEST * min(probes, key=lambda probe: probe.learned).learning_rate
        return upper.learning_rate / 2 if upper.learning_rate > lowest else None
    low, high = math.log(lower.learning_rate), math.log(upper.learning_rate)
    share = (lower.learned - target) / (lower.learned - upper.learned)
    return math.exp(low + min(max(share, 0.1), 0.9) * (high - low))
