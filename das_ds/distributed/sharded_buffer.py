"""Sharded buffer: a table whose rows are distributed over the ranks, row s on rank s mod W.

Shape legend: C rows of the buffer, W ranks, D values per row, n rows that are read or written together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from das_ds.distributed.collectives import all_reduce_sum, rank, world_size


class ShardedBuffer:
    """(C, D) int32 zeros, of which each rank stores at most ceil(C / W) rows.

    Args:
        num_rows: C.
        width: D.
        device: where rows are stored and collectives run.
    """

    def __init__(self, num_rows: int, width: int, device: torch.device) -> None:
        num_local = len(range(rank(), num_rows, world_size()))
        self.rows = torch.zeros(num_local, width, dtype=torch.int32, device=device)
        """This rank's rows s = rank, rank + W, ... in order."""

    def write(self, indices: NDArray[np.int64], rows: torch.Tensor) -> None:
        """Write rows; a collective.

        Args:
            indices: of n different rows of the buffer, equal on every rank.
            rows: (n, D) int32, each nonzero on at most one rank; overwritten.
        """
        # One collective brings every row to the rank that stores it; all others contribute zeros.
        rows = all_reduce_sum(rows)
        positions, slots = self._local(indices)
        self.rows.index_copy_(0, slots, rows.index_select(0, positions))

    def read(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Read rows, (n, D), equal on every rank; a collective."""
        positions, slots = self._local(indices)
        rows = self.rows.new_zeros(len(indices), self.rows.shape[1])
        rows.index_copy_(0, positions, self.rows.index_select(0, slots))
        # Exactly one rank contributes each row, so the integer sum is that row bit for bit.
        return all_reduce_sum(rows)

    def load(self, rows_by_rank: Sequence[torch.Tensor]) -> None:
        """Load the `rows` of all ranks that saved, in rank order; their number may differ from that of this run."""
        num_saved = len(rows_by_rank)
        # Rank r of the W' that saved has rows r, r + W', ...; this rank keeps those that are its own now.
        for saved_rank, rows in enumerate(rows_by_rank):
            indices = torch.arange(saved_rank, saved_rank + len(rows) * num_saved, num_saved)
            is_local = indices % world_size() == rank()
            slots = (indices[is_local] // world_size()).to(self.rows.device)
            self.rows[slots] = rows[is_local].to(self.rows.device)

    def _local(self, indices: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the rows are on this rank: their positions among `indices`, and their positions in `rows`."""
        positions = np.flatnonzero(indices % world_size() == rank())
        slots = indices[positions] // world_size()
        device = self.rows.device
        return to_device_non_blocking(positions, device), to_device_non_blocking(slots, device)


def to_device_non_blocking(values: NDArray[np.int64] | NDArray[np.float64], device: torch.device) -> torch.Tensor:
    """A small array on the device, copied in stream order: a blocking copy would wait for all queued kernels."""
    return torch.from_numpy(values).to(device, non_blocking=True)
