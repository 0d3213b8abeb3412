"""What ranks ask each other before a run: whether they meet, how fast they talk, what each of them found."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from statistics import median
from typing import TypeVar

import torch
import torch.distributed as dist

from das_ds.distributed.process_group import ProcessGroup
from das_ds.errors import PreflightError

T = TypeVar("T")

NUM_SMALL, NUM_LARGE = 20, 3
LARGE_NUMEL = 2**24
"""Float32 values of 64 MiB."""


@dataclass(frozen=True)
class LinkSpeed:
    """How fast all-reduces are, as one rank saw it."""

    backend: str
    latency_s: float
    """Seconds for one number."""
    bytes_per_s: float
    """Size of a large tensor by the time that it took (algorithm bandwidth)."""


class PeerCheck:
    """The ranks of a run that is checked; nothing waits for longer than a time-out.

    Args:
        timeout: for all ranks to start, and for each answer.

    Raises:
        PreflightError: not all of them start, or they do not reach each other.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._timeout = timeout
        try:
            self.ranks = ProcessGroup(timeout)
            # Findings are plain objects, which travel over TCP whatever the backend of the run is.
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        except RuntimeError as error:
            raise PreflightError(
                f"the ranks do not find each other within {timeout.total_seconds():g} s (runtime.hang_timeout): "
                f"{str(error).splitlines()[0]}; check that as many processes start as WORLD_SIZE says, that all have "
                "the same MASTER_ADDR and MASTER_PORT, and that this address is reached from every node"
            ) from error

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order, on every rank."""
        values: list[T | None] = [None] * self.ranks.info.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self._group)

    def measure_bandwidth(self) -> LinkSpeed:
        """All-reduce on the run's backend and device, a small tensor and a large one.

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
        # Not earlier: a rank that left after a wrong sum would leave the others waiting for the next one.
        num_ranks = self.ranks.info.world_size
        expected = num_ranks * (num_ranks + 1) / 2
        for _, total in (*small, *large):
            if not bool((total == expected).all()):
                value = total[total != expected][0].item()
                raise PreflightError(f"all-reduce gave {value:g}, expected {expected:g}, the sum of 1 to {num_ranks}")
        # The first of each makes connections and buffers.
        latency = median(seconds for seconds, _ in small[1:])
        fastest = min(seconds for seconds, _ in large[1:])
        return LinkSpeed(dist.get_backend(), latency, LARGE_NUMEL * torch.float32.itemsize / fastest)

    def _all_reduce(self, numel: int) -> tuple[float, torch.Tensor]:
        """Seconds that a sum took, and the sum."""
        info = self.ranks.info
        tensor = torch.full((numel,), info.rank + 1.0, device=info.device)
        begin = time.perf_counter()
        work = dist.all_reduce(tensor, async_op=True)
        assert work is not None, "every rank is in the default group"
        # Before those give up that have failed already and wait with what they found.
        work.wait(self._timeout / 2)
        if info.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin, tensor
