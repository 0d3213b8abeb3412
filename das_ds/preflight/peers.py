"""Preflight checks between ranks: rendezvous, bandwidth, and the exchange of results."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from statistics import median
from typing import TypeVar

import torch
import torch.distributed as dist

from das_ds.distributed.process_group import init_process_group
from das_ds.distributed.rendezvous import rendezvous_failure
from das_ds.errors import PreflightError

T = TypeVar("T")

NUM_SMALL = 20
NUM_LARGE = 3
"""All-reduces of each size that are timed, after one that is not."""
LARGE_NUMEL = 2**24
"""float32 values in 64 MiB."""


@dataclass(frozen=True)
class LinkSpeed:
    """Speed of all-reduces, as measured by one rank."""

    backend: str
    latency_s: float
    """Seconds for one float32."""
    bytes_per_s: float
    """Size of a large tensor divided by its time (algorithm bandwidth)."""


class PeerCheck:
    """The process group of a preflight; nothing waits longer than the timeout.

    Args:
        timeout: for the rendezvous, and for each collective.

    Raises:
        PreflightError: not all ranks start, or they cannot reach each other.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._timeout = timeout
        try:
            self.ranks = init_process_group(timeout)
            # Results are Python objects, so they are exchanged over gloo whatever the run's backend is.
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        except RuntimeError as error:
            raise rendezvous_failure(error, timeout) from error

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order, on every rank."""
        values: list[T | None] = [None] * self.ranks.info.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self._group)

    def measure_bandwidth(self) -> LinkSpeed:
        """Time all-reduces of a small and a large tensor on the run's backend and device.

        Raises:
            PreflightError: the backend fails, or a sum is wrong.
        """
        self.barrier()
        try:
            small = [self._all_reduce(1) for _ in range(1 + NUM_SMALL)]
            large = [self._all_reduce(LARGE_NUMEL) for _ in range(1 + NUM_LARGE)]
        except RuntimeError as error:
            raise PreflightError(
                f"all-reduce over {dist.get_backend()} failed: {str(error).splitlines()[0]}"
            ) from error
        # Checked after all sums: a rank that left after a wrong one would leave the others waiting for the next.
        num_ranks = self.ranks.info.world_size
        expected = num_ranks * (num_ranks + 1) / 2
        for _, total in (*small, *large):
            if not bool((total == expected).all()):
                value = total[total != expected][0].item()
                raise PreflightError(f"all-reduce gave {value:g}, expected {expected:g}, the sum of 1 to {num_ranks}")
        # The first of each size sets up connections and buffers.
        latency = median(seconds for seconds, _ in small[1:])
        fastest = min(seconds for seconds, _ in large[1:])
        return LinkSpeed(dist.get_backend(), latency, LARGE_NUMEL * torch.float32.itemsize / fastest)

    def _all_reduce(self, numel: int) -> tuple[float, torch.Tensor]:
        """(seconds, sum) of one all-reduce."""
        info = self.ranks.info
        tensor = torch.full((numel,), info.rank + 1.0, device=info.device)
        begin = time.perf_counter()
        work = dist.all_reduce(tensor, async_op=True)
        assert work is not None, "every rank is in the default group"
        # Half the timeout, so that this rank reports before ranks that failed earlier give up waiting for it.
        work.wait(self._timeout / 2)
        if info.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin, tensor
