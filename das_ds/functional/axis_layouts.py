"""How the units of a group lie along an axis of a parameter.

Parameters that hold several maps at once (fused query, key and value; gate and up projection; one matrix per expert)
are described by the order of their parts.

Shape legend: E blocks (experts; 1 for an ordinary matrix), A entries of the axis in one block, U units, K owners.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

NOBODY = -1


@dataclass(frozen=True)
class Axis:
    """The sizes that a spread has to reconcile."""

    num_blocks: int
    """E."""
    size: int
    """A."""
    num_units: int
    """U of one layer."""
    num_key_value_heads: int
    """Key/value heads of one layer; as many as units without grouped-query attention."""


Spread = Callable[[Axis], torch.Tensor]
"""Axis -> (E * A, K) int64, the units that own each entry; `NOBODY` fills up.

Raises:
    ValueError: sizes that do not divide.
"""


def evenly(axis: Axis) -> torch.Tensor:
    """Unit u owns a run of A / U entries, the same in every block."""
    return _runs(axis.size, axis.num_units).repeat(axis.num_blocks)[:, None]


def halves(axis: Axis) -> torch.Tensor:
    """Two maps one after the other, such as gate and up projection; unit u owns a run of each."""
    half = _runs(_divided(axis.size, 2, "halves"), axis.num_units)
    return half.repeat(2 * axis.num_blocks)[:, None]


def key_value(axis: Axis) -> torch.Tensor:
    """Key/value heads; the query heads that use one own it together (grouped-query attention)."""
    sharers = _sharers(axis)
    width = _divided(axis.size, axis.num_key_value_heads, "key/value heads")
    return sharers.repeat_interleave(width, dim=0).repeat(axis.num_blocks, 1)


def query_key_value(axis: Axis) -> torch.Tensor:
    """Queries of all heads, then their keys, then their values."""
    sharers = _sharers(axis)
    width = _divided(axis.size, axis.num_units + 2 * axis.num_key_value_heads, "query, key and value heads")
    query = torch.full((axis.num_units, sharers.shape[1]), NOBODY)
    query[:, 0] = torch.arange(axis.num_units)
    return torch.cat((query, sharers, sharers)).repeat_interleave(width, dim=0).repeat(axis.num_blocks, 1)


def experts(axis: Axis) -> torch.Tensor:
    """Block e holds units [e * U / E, (e + 1) * U / E), each a run of its axis."""
    own = _divided(axis.num_units, axis.num_blocks, "experts")
    return _by_block(_runs(axis.size, own), own, axis.num_blocks)


def expert_halves(axis: Axis) -> torch.Tensor:
    """Block e holds its units twice, such as gate and up projection of an expert."""
    own = _divided(axis.num_units, axis.num_blocks, "experts")
    return _by_block(_runs(_divided(axis.size, 2, "halves"), own).repeat(2), own, axis.num_blocks)


SPREADS: dict[str, Spread] = {
    "evenly": evenly,
    "halves": halves,
    "key_value": key_value,
    "query_key_value": query_key_value,
    "experts": experts,
    "expert_halves": expert_halves,
}


def _runs(size: int, num_units: int) -> torch.Tensor:
    return torch.arange(num_units).repeat_interleave(_divided(size, num_units, "units"))


def _by_block(units: torch.Tensor, own: int, num_blocks: int) -> torch.Tensor:
    return (units[None, :] + own * torch.arange(num_blocks)[:, None]).reshape(-1, 1)


def _sharers(axis: Axis) -> torch.Tensor:
    """(key/value heads, query heads of each)."""
    each = _divided(axis.num_units, axis.num_key_value_heads, "key/value heads")
    return torch.arange(axis.num_units).view(axis.num_key_value_heads, each)


def _divided(size: int, parts: int, what: str) -> int:
    if not parts or size % parts:
        raise ValueError(f"{size} entries, which is no multiple of {parts} {what}")
    return size // parts
