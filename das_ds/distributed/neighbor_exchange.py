"""Exchanges between the ranks that need something of each other: each sends to every other exactly what that one needs.

A computation that needs them is a generator of `Outgoing`, which is sent what the other ranks sent here. On real ranks
`run_exchanges` drives it; the generators of any number of ranks can also be driven in turn by one process.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

import torch
import torch.distributed as dist

from das_ds.distributed.collectives import in_collective, world_size


class Outgoing(NamedTuple):
    """What a rank sends in one exchange."""

    values: torch.Tensor
    """Flat, by receiving rank."""
    send_sizes: list[int]
    """Elements to every rank, also to itself."""
    receive_sizes: list[int]
    """Elements from every rank; known beforehand, so that nothing waits to learn them."""


Exchanges = Generator[Outgoing, torch.Tensor, None]
"""Exchanges in a row; each is answered with the values received, flat, by sending rank."""


def run_exchanges(exchanges: Exchanges) -> None:
    """Run a computation with its exchanges, which every rank runs at the same time with as many of them."""
    received: torch.Tensor | None = None
    while True:
        try:
            outgoing = next(exchanges) if received is None else exchanges.send(received)
        except StopIteration:
            return
        received = exchange(outgoing)


def exchange(outgoing: Outgoing) -> torch.Tensor:
    """Values of every rank for this one, by sending rank; the identity on one rank.

    One `all_to_all_single`, in which only ranks with something to say to each other communicate. Values travel as
    bytes, so that backends need not know their type.
    """
    if world_size() == 1:
        return outgoing.values
    values = outgoing.values
    received = values.new_empty(sum(outgoing.receive_sizes))
    size = values.element_size()
    with in_collective():
        dist.all_to_all_single(
            received.view(torch.uint8),
            values.view(torch.uint8),
            [count * size for count in outgoing.receive_sizes],
            [count * size for count in outgoing.send_sizes],
        )
    return received
