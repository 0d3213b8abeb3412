"""Collectives that are the identity on one rank, so that callers need not check the world size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass
class CollectiveCount:
    """How many collectives of das_ds this process has entered and exited; those inside DeepSpeed are not counted."""

    entered: int = 0
    exited: int = 0

    @property
    def is_inside(self) -> bool:
        """Whether this process is inside one of them."""
        return self.entered > self.exited


COLLECTIVE_COUNT = CollectiveCount()
"""Read by the heartbeat."""


@contextmanager
def in_collective() -> Iterator[None]:
    """Wraps a call that waits for other ranks, so that the watchdog can tell waiting from a stall."""
    COLLECTIVE_COUNT.entered += 1
    try:
        yield
    finally:
        COLLECTIVE_COUNT.exited += 1


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of `tensor` over ranks, in place; returned for convenience."""
    if world_size() > 1:
        with in_collective():
            dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """Element-wise maximum of `tensor` over ranks, in place; returned for convenience."""
    if world_size() > 1:
        with in_collective():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def all_gather_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """Rows of all ranks in rank order, gradients flowing back to the rank each row came from.

    Args:
        tensor: (B, ...) with the same B on every rank.

    Returns:
        (B * world_size, ...).
    """
    if world_size() == 1:
        return tensor
    gathered: torch.Tensor = _AllGatherWithGrad.apply(tensor)
    return gathered


class _AllGatherWithGrad(torch.autograd.Function):
    """All-gather whose backward pass sums: every rank's loss reads every row, so its gradients add up over ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        rows_by_rank = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
        with in_collective():
            dist.all_gather(rows_by_rank, tensor.contiguous())
        ctx.num_rows = len(tensor)
        return torch.cat(rows_by_rank)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> torch.Tensor:
        # All-reduce instead of reduce-scatter: the rows are pooled vectors, so it is cheap, and gloo supports it.
        total = all_reduce_sum(grad_outputs[0].clone(memory_format=torch.contiguous_format))
        return total[rank() * ctx.num_rows : (rank() + 1) * ctx.num_rows]


def reduce_sum(tensor: torch.Tensor, destination: int) -> torch.Tensor:
    """Sum of `tensor` over ranks on one of them, in place; undefined on the others. Returned for convenience.

    A rank sends n bytes for a tensor of n, where an all-reduce would send twice as many.
    """
    if world_size() > 1:
        with in_collective():
            dist.reduce(tensor, destination)
    return tensor


def broadcast_among(tensor: torch.Tensor, source: int, receivers: Sequence[int]) -> None:
    """Copy the source's tensor into those of the receivers, in place; other ranks may call it and do nothing.

    One broadcast where that is all ranks; otherwise the source sends the tensor to each of the receivers, which are
    few. A collective of those ranks, which call it in the same order.

    Args:
        tensor: (...), contiguous, of the same shape and dtype on all these ranks.
        source: rank.
        receivers: ranks, the source among them or not; the same on every rank.
    """
    others = [receiver for receiver in receivers if receiver != source]
    if not others or not tensor.numel() or rank() not in (source, *others):
        return
    with in_collective():
        if len(others) == world_size() - 1:
            dist.broadcast(tensor, source)
            return
        if rank() == source:
            operations = [dist.P2POp(dist.isend, tensor, receiver) for receiver in others]
        else:
            operations = [dist.P2POp(dist.irecv, tensor, source)]
        # Batched, so that NCCL uses the communicator of all ranks and makes none for each pair.
        for request in dist.batch_isend_irecv(operations):
            request.wait()
