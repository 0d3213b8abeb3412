"""A table whose rows are divided over the ranks: row s is on rank s mod W.

Shape legend: C rows of the table, W ranks, D numbers per row, n rows that are read or written together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from das_ds.distributed.collectives import all_reduce_sum, rank, world_size


class ShardedBuffer:
    """(C, D) int32 zeros, of which each rank keeps ceil(C / W) rows at most.

    Args:
        num_rows: C.
        width: D.
        device: where the rows are kept and collectives run.
    """

    def __init__(self, num_rows: int, width: int, device: torch.device) -> None:
        own = len(range(rank(), num_rows, world_size()))
        self.rows = torch.zeros(own, width, dtype=torch.int32, device=device)
        """This rank's rows s = rank, rank + W, ... in order."""

    def write(self, numbers: NDArray[np.int64], rows: torch.Tensor) -> None:
        """Put rows in their places; a collective.

        Args:
            numbers: of n different rows, equal on every rank.
            rows: (n, D) int32, each given by one rank and 0 on all others; used up.
        """
        rows = all_reduce_sum(rows)
        given, own = self._own(numbers)
        self.rows.index_copy_(0, own, rows.index_select(0, given))

    def read(self, numbers: NDArray[np.int64]) -> torch.Tensor:
        """(n, D) rows of these numbers, equal on every rank; a collective."""
        given, own = self._own(numbers)
        rows = self.rows.new_zeros(len(numbers), self.rows.shape[1])
        rows.index_copy_(0, given, self.rows.index_select(0, own))
        # One rank gives each row, so that the sum is that row, whatever its bits mean.
        return all_reduce_sum(rows)

    def load(self, parts: Sequence[torch.Tensor]) -> None:
        """Take `rows` of all ranks, in their order, from any number of them."""
        for number, part in enumerate(parts):
            slots = torch.arange(number, number + len(part) * len(parts), len(parts))
            is_own = slots % world_size() == rank()
            self.rows[(slots[is_own] // world_size()).to(self.rows.device)] = part[is_own].to(self.rows.device)

    def _own(self, numbers: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the given rows are this rank's, and their places here."""
        given = np.flatnonzero(numbers % world_size() == rank())
        device = self.rows.device
        return to_device_non_blocking(given, device), to_device_non_blocking(numbers[given] // world_size(), device)


def to_device_non_blocking(values: NDArray[np.int64] | NDArray[np.float64], device: torch.device) -> torch.Tensor:
    """Few numbers on the device, on whose queue they are put; a plain copy would wait for all that is queued."""
    return torch.from_numpy(values).to(device, non_blocking=True)
