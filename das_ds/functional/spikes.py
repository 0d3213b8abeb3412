"""When a loss is so far above the last ones that something must have gone wrong."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

RESOLUTION = 2.0**-20
"""Differences of losses that are mere rounding: a cross-entropy in float32 is a difference of logits of about 10, so
its error is about 1e-6 however small it is itself, and grows with it beyond 1."""


class SpikeDetector:
    """Mean mu and standard deviation sigma of the last accepted losses; a loss x is a spike if x > mu + d * sigma.

    Both are taken anew from the losses themselves, in float64 and in two passes: sums that are updated from step to
    step would drift, and a run that continues could not find the same numbers again. Sigma is divided by the number of
    losses. Where all of them are equal, or nearly, sigma counts as `RESOLUTION`, so that rounding is no spike.

    Args:
        window: number of losses; nothing is a spike before so many are known.
        deviations: d, the number of standard deviations.
    """

    def __init__(self, window: int, deviations: float) -> None:
        assert window > 1 and deviations > 0.0, f"found window {window}, deviations {deviations}"
        self._losses: deque[float] = deque(maxlen=window)
        self._window, self._deviations = window, deviations

    @property
    def mean(self) -> float:
        """Mean of the losses in the window, of which there is at least one."""
        return math.fsum(self._losses) / len(self._losses)

    @property
    def deviation(self) -> float:
        """Standard deviation of the losses in the window, of which there is at least one."""
        mean = self.mean
        return math.sqrt(math.fsum((loss - mean) ** 2 for loss in self._losses) / len(self._losses))

    def is_spike(self, loss: float) -> bool:
        """Whether a finite loss rises above what the window allows."""
        if len(self._losses) < self._window:
            return False
        mean = self.mean
        smallest = RESOLUTION * max(1.0, abs(mean))
        return loss > mean + self._deviations * max(self.deviation, smallest)

    def accept(self, loss: float) -> None:
        """Take a finite loss into the window, in place of the oldest; not to be called for a spike."""
        assert math.isfinite(loss), f"found {loss}, expected a finite loss"
        self._losses.append(loss)

    def clear(self) -> None:
        """Forget all losses."""
        self._losses.clear()

    def state(self) -> list[float]:
        """The losses in the window, oldest first."""
        return list(self._losses)

    def load(self, losses: Sequence[float]) -> None:
        """Continue from a `state`; of a longer window the newest losses count."""
        self._losses = deque(losses, maxlen=self._window)
