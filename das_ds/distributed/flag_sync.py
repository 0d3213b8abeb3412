"""Asynchronous all-reduce of flags: ranks agree on saving and stopping without waiting for each other."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist

from das_ds.distributed.collectives import in_collective
from das_ds.distributed.process_group import LONG_TIMEOUT, ProcessGroup


@dataclass(frozen=True)
class Flags:
    """Flags of one rank at a save point; reduced: those that any rank has set."""

    stop: bool = False
    """The run is asked to stop."""
    save: bool = False
    """A checkpoint is requested."""
    writing: bool = False
    """A checkpoint is still being written."""
    failed: bool = False
    """A checkpoint could not be written."""
    ends: bool = False
    """A rank has an error that ends the run on all ranks."""


class FlagSync:
    """Reduces flags over ranks while training continues: each exchange returns the flags of the one before.

    All ranks have to make the same exchanges, and build this object together, as it makes a process group.
    """

    def __init__(self, ranks: ProcessGroup) -> None:
        self._world_size = ranks.info.world_size
        # A separate group, because collectives of other groups may be under way at the same time; on the CPU, so that
        # no exchange waits for a GPU; and with a long time-out, because any work may lie between two exchanges.
        self._group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
        self._pending: tuple[torch.Tensor, dist.Work | None] | None = None

    def exchange(self, local: Flags) -> Flags:
        """Begin to reduce this rank's flags.

        Returns:
            The flags of all ranks at the exchange before; none at the first.
        """
        previous = self.wait()
        values = torch.tensor(astuple(local), dtype=torch.uint8)
        work = None
        if self._world_size > 1:
            work = dist.all_reduce(values, dist.ReduceOp.MAX, self._group, async_op=True)
        self._pending = (values, work)
        return previous

    def wait(self) -> Flags:
        """Wait for the pending exchange and return its flags; none where nothing is pending."""
        if self._pending is None:
            return Flags()
        values, work = self._pending
        self._pending = None
        if work is not None:
            with in_collective():
                work.wait()
        return Flags(*(bool(value) for value in values.tolist()))

    def stop_reasons(self, local: str | None) -> str:
        """Why the run stops, and on which ranks: "SIGUSR1 (rank 0)"; a collective.

        Args:
            local: this rank's reason; None: it was not asked to stop.
        """
        reasons: list[str | None] = [None] * self._world_size
        with in_collective():
            dist.all_gather_object(reasons, local, group=self._group)
        ranks_by_reason: dict[str, list[int]] = {}
        for rank, reason in enumerate(reasons):
            if reason is not None:
                ranks_by_reason.setdefault(reason, []).append(rank)
        return ", ".join(f"{reason} ({self._describe(ranks)})" for reason, ranks in ranks_by_reason.items())

    def _describe(self, ranks: list[int]) -> str:
        if len(ranks) == 1:
            return f"rank {ranks[0]}"
        if len(ranks) == self._world_size:
            return "all ranks"
        return f"{len(ranks)} ranks, rank {ranks[0]} first"
