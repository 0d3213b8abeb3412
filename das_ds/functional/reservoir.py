"""What a bounded buffer keeps of a stream of unknown length, and which positions of a kept sequence.

Shape legend: N samples, B sequences, P predicted positions, K positions kept of a sequence.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

NOT_KEPT = -1


def reservoir_slots(first: int, uniforms: NDArray[np.float64], capacity: int) -> NDArray[np.int64]:
    """Algorithm R (Vitter, Random Sampling with a Reservoir, 1985): after n samples each is kept with chance C / n.

    Sample n, counted from 0, goes to slot n while there are free ones, and then to slot floor(u (n + 1)), if there is
    such a slot, in place of what lies there.

    Args:
        first: number of the first of N samples in the stream.
        uniforms: (N,) u of each sample, uniform in [0, 1).
        capacity: C.

    Returns:
        (N,) slot of each sample, or `NOT_KEPT`; of two samples with one slot the later stays.
    """
    numbers = first + np.arange(len(uniforms))
    drawn = (uniforms * (numbers + 1)).astype(np.int64)
    slots = np.where(numbers < capacity, numbers, drawn)
    return np.where(slots < capacity, slots, NOT_KEPT)


def last_of_each_slot(slots: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of the samples that stay when all N are stored in turn; every slot once."""
    kept = np.flatnonzero(slots != NOT_KEPT)[::-1]
    _, last = np.unique(slots[kept], return_index=True)
    return kept[last]


def spread_positions(
    predicted: torch.Tensor, num_rows: int, length: int, count: int, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """At most K predicted positions of each sequence, from all of it: of n > K those at floor((i + u) n / K), i < K.

    Every position is as likely as any other, and no two are the same.

    Args:
        predicted: (P,) int64, indices into the flattened (B, length) positions, in order.
        num_rows: B.
        length: tokens per sequence.
        count: K.
        offsets: (B,) float64 u, uniform in [0, 1).

    Returns:
        (B, K) indices into `predicted`, at most P, and (B, K) bool, whether there is such a position.
    """
    rows = predicted // length
    counts = predicted.new_zeros(num_rows).index_add(0, rows, torch.ones_like(rows))
    order = torch.arange(count, device=predicted.device).expand(num_rows, -1)
    spread = ((order + offsets[:, None]) * counts[:, None] / count).long()
    chosen = torch.where(counts[:, None] > count, spread, order)
    indices = (counts.cumsum(0) - counts)[:, None] + chosen
    return indices.clamp_max(len(predicted)), order < counts[:, None]


def padded(values: torch.Tensor) -> torch.Tensor:
    """(P,) or (P, H) with one more entry of 0, so that index P exists."""
    return functional.pad(values, (0, 0) * (values.dim() - 1) + (0, 1))
