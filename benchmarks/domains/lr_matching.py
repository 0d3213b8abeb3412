"""Learning-rate matching: naive training with its rate lowered until it learns as much as another variant.

A run that learns less also forgets less. A method is only better if it forgets less than naive training with the same
loss after learning domains 2..T. The first domain does not count, because learning it makes nothing be forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

MIN_RELATIVE_RATE = 1 / 32
"""Rates below this fraction of the best one are not searched."""
MARGIN = 0.1
"""Fraction of a bracket that is kept clear at both of its ends."""


@dataclass(frozen=True)
class Probe:
    """A learning rate and its mean loss after learning domains 2..T, over all seeds."""

    learning_rate: float
    learned: float


@dataclass(frozen=True)
class Match:
    """Outcome of the search for one variant."""

    label: str
    """The variant that is matched."""
    target: float
    """Its mean loss after learning domains 2..T, over all seeds."""
    tolerance: float
    """Nats."""
    probes: tuple[Probe, ...]
    """All known rates; those tried for this match come last."""

    @property
    def best(self) -> Probe:
        """The probe nearest to the target."""
        return min(self.probes, key=lambda probe: abs(probe.learned - self.target))

    @property
    def is_met(self) -> bool:
        """Whether the nearest probe is within the tolerance."""
        return abs(self.best.learned - self.target) <= self.tolerance

    @property
    def needs_lowering(self) -> bool:
        """Whether the variant learns less than naive training at its best known rate."""
        return self.target > min(probe.learned for probe in self.probes)


def match(
    label: str,
    target: float,
    known: list[Probe],
    run_rate: Callable[[float], float],
    *,
    tolerance: float,
    max_probes: int,
) -> Match:
    """Narrow the bracket around the target in log learning rate, where the loss is nearly linear.

    The next rate is where the line through the ends of the bracket meets the target (regula falsi), kept away from the
    ends by a tenth of the bracket, so that it narrows as fast as bisection would.

    Args:
        label, target: of the variant.
        known: rates that were run already, at least one.
        run_rate: runs naive training at a rate and returns its mean loss after learning domains 2..T.
        tolerance: nats; the search ends when a rate is this near.
        max_probes: rates to run at most.
    """
    found = Match(label, target, tolerance, tuple(known))
    for _ in range(max_probes):
        if found.is_met or not found.needs_lowering:
            break
        rate = next_rate(found.probes, target)
        if rate is None:
            break
        found = Match(label, target, tolerance, (*found.probes, Probe(rate, run_rate(rate))))
    return found


def next_rate(probes: tuple[Probe, ...], target: float) -> float | None:
    """The rate to try next; None if even the lowest allowed rate would learn too much.

    Args:
        probes: at least one of them learns more than the target, that is, has a smaller loss.
        target: mean loss after learning domains 2..T.
    """
    upper = min((probe for probe in probes if probe.learned < target), key=lambda probe: probe.learning_rate)
    lower = max(
        (probe for probe in probes if probe.learned >= target and probe.learning_rate < upper.learning_rate),
        key=lambda probe: probe.learning_rate,
        default=None,
    )
    if lower is None:
        # No bracket yet: go down by halves.
        min_rate = MIN_RELATIVE_RATE * min(probes, key=lambda probe: probe.learned).learning_rate
        return upper.learning_rate / 2 if upper.learning_rate > min_rate else None
    low = math.log(lower.learning_rate)
    high = math.log(upper.learning_rate)
    fraction = (lower.learned - target) / (lower.learned - upper.learned)
    return math.exp(low + min(max(fraction, MARGIN), 1 - MARGIN) * (high - low))
