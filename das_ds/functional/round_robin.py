"""Weighted round robin: which of several sources each sample comes from, in exact proportions in every window."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


class WeightedRoundRobin:
    """Turns of n sources, a pure function of the sample number.

    Tijdeman, *The chairman assignment problem* (Discrete Mathematics 32, 1980): with parts p_i = w_i / W, W the sum of
    the weights, the number c_i(K) of the first K samples that come from source i stays as close to p_i K as it can,

        |c_i(K) - p_i K| <= 1 - 1 / (2n - 2)     for every K and i,

    so that of any B consecutive samples, in whatever batch or rank, it has less than two more or less than p_i B.
    Equal weights are plain round robin, in the order of the sources. The turns repeat after W samples.

    Args:
        weights: w_i, integers above 0; W is the sum after they are divided by their greatest common divisor.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        divisor = math.gcd(*weights)
        smallest = tuple(weight // divisor for weight in weights)
        self._weights = np.array(smallest, dtype=np.int64)
        self._sources, self._earlier = _period(smallest)

    def __getitem__(self, number: int) -> tuple[int, int]:
        """Source of global sample `number`, and how many earlier samples come from the same source."""
        period, position = divmod(number, len(self._sources))
        source = int(self._sources[position])
        return source, period * int(self._weights[source]) + int(self._earlier[position])

    def counts(self, num_samples: int) -> list[int]:
        """How many of the first samples come from each source."""
        periods, rest = divmod(num_samples, len(self._sources))
        counts = periods * self._weights + np.bincount(self._sources[:rest], minlength=len(self._weights))
        return list(counts.tolist())

    def capped_counts(self, num_samples: int, sizes: Sequence[int]) -> list[int]:
        """How many come from each source if one that has given all of its items is passed over.

        Args:
            num_samples: at most the sum of the sizes.
            sizes: items of each source.
        """
        assert num_samples <= sum(sizes), f"{num_samples} of {sum(sizes)}"
        low = num_samples
        high = max(low, 1)
        while sum(map(min, self.counts(high), sizes)) < num_samples:
            high *= 2
        # Every turn gives at most one item, so that the first turn with enough of them has exactly as many.
        while low < high:
            middle = (low + high) // 2
            if sum(map(min, self.counts(middle), sizes)) < num_samples:
                low = middle + 1
            else:
                high = middle
        return list(map(min, self.counts(low), sizes))


@lru_cache(maxsize=16)
def _period(weights: tuple[int, ...]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Source of each of the first W samples, and how many before it come from the same source; both (W,)."""
    total = sum(weights)
    # A source may take turn K from m (w K - W c) >= W on, m = 2n - 2, and has to before W (m - 1 + m c) / (m w); of
    # those that may, the one that has to first is chosen. All in integers.
    m = max(2 * len(weights) - 2, 1)
    common = math.lcm(*weights)
    counts = [0] * len(weights)
    sources = np.zeros(total, dtype=np.int32)
    earlier = np.zeros(total, dtype=np.int64)

    def first_turn(source: int) -> int:
        return -(-total * (1 + m * counts[source]) // (m * weights[source]))

    waiting = [(first_turn(source), source) for source in range(len(weights))]
    heapq.heapify(waiting)
    ready: list[tuple[int, int]] = []
    for turn in range(1, total + 1):
        while waiting and waiting[0][0] <= turn:
            _, source = heapq.heappop(waiting)
            heapq.heappush(ready, ((m - 1 + m * counts[source]) * (common // weights[source]), source))
        _, source = heapq.heappop(ready)
        sources[turn - 1] = source
        earlier[turn - 1] = counts[source]
        counts[source] += 1
        heapq.heappush(waiting, (first_turn(source), source))
    for table in (sources, earlier):
        table.flags.writeable = False
    return sources, earlier
