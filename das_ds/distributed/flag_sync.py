"""What all ranks agree on at boundaries, without any of them waiting for it."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist

from das_ds.distributed.collectives import in_collective
from das_ds.distributed.process_group import LONG_TIMEOUT, ProcessGroup


@dataclass(frozen=True)
class Flags:
    """What one rank reports at a boundary; agreed: what any rank reported."""

    stop: bool = False
    """The run is asked to stop."""
    save: bool = False
    """A checkpoint is wanted."""
    writing: bool = False
    """A checkpoint is still being written."""
    failed: bool = False
    """A checkpoint could not be written."""
    ends: bool = False
    """A rank has an error that is to end the run on all of them."""


class FlagSync:
    """Flags reduced over ranks while training goes on: a boundary reads what was reported at the one before.

    All ranks have to pass the same boundaries. Built by all of them together, as it makes a process group.
    """

    def __init__(self, ranks: ProcessGroup) -> None:
        self._world_size = ranks.info.world_size
        # Its own group: collectives of other groups may be under way at the same time. On the host, so that no boundary
        # waits for a GPU; and with time enough for whatever lies between two boundaries.
        self._group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
        self._pending: tuple[torch.Tensor, dist.Work | None] | None = None

    def exchange(self, local: Flags) -> Flags:
        """Report this boundary's flags; returns what all ranks reported at the one before, none at the first."""
        agreed = self.settle()
        values = torch.tensor(astuple(local), dtype=torch.uint8)
        work = dist.all_reduce(values, dist.ReduceOp.MAX, self._group, async_op=True) if self._world_size > 1 else None
        self._pending = values, work
        return agreed

    def settle(self) -> Flags:
        """Wait for the flags that are under way, so that none are left; returns them, once."""
        if self._pending is None:
            return Flags()
        values, work = self._pending
        self._pending = None
        if work is not None:
            with in_collective():
                work.wait()
        return Flags(*(bool(value) for value in values.tolist()))

    def reasons(self, local: str | None) -> str:
        """Why the run stops, with the ranks that were asked: "SIGUSR1 (rank 0)"; all ranks call it together."""
        reasons: list[str | None] = [None] * self._world_size
        with in_collective():
            dist.all_gather_object(reasons, local, group=self._group)
        ranks_of: dict[str, list[int]] = {}
        for rank, reason in enumerate(reasons):
            if reason is not None:
                ranks_of.setdefault(reason, []).append(rank)
        return ", ".join(f"{reason} ({self._named(ranks)})" for reason, ranks in ranks_of.items())

    def _named(self, ranks: list[int]) -> str:
        if len(ranks) == 1:
            return f"rank {ranks[0]}"
        if len(ranks) == self._world_size:
            return "all ranks"
        return f"{len(ranks)} ranks, rank {ranks[0]} first"
