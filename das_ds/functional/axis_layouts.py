"""Axis layouts: which unit of a group owns which entry along an axis of a parameter.

Parameters that hold several maps at once (fused query, key and value; gate and up projection; one matrix per expert)
are described by the order of these maps along the axis.

Shape legend: E blocks (experts; 1 for an ordinary matrix), A entries of the axis in one block, U units, K owners.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

NO_OWNER = -1


@dataclass(frozen=True)
class Axis:
    """The sizes that a layout has to reconcile."""

    num_blocks: int
    """E."""
    size: int
    """A."""
    num_units: int
    """U of one layer."""
    num_key_value_heads: int
    """Key/value heads of one layer; as many as units without grouped-query attention."""


AxisLayout = Callable[[Axis], torch.Tensor]
"""Axis -> (E * A, K) int64, the units that own each entry; `NO_OWNER` fills up.

Raises:
    ValueError: sizes that do not divide.
"""


def contiguous(axis: Axis) -> torch.Tensor:
    """Unit u owns a run of A / U entries, the same in every block."""
    owners = _equal_runs(axis.size, axis.num_units)
    return owners.repeat(axis.num_blocks)[:, None]


def gate_up(axis: Axis) -> torch.Tensor:
    """Gate projection, then up projection; unit u owns a run of each."""
    width = _divide(axis.size, 2, "gate and up projections")
    owners = _equal_runs(width, axis.num_units)
    return owners.repeat(2 * axis.num_blocks)[:, None]


def kv(axis: Axis) -> torch.Tensor:
    """Key/value heads; the query heads that share one own it together (grouped-query attention)."""
    query_heads = _query_heads_by_kv_head(axis)
    width = _divide(axis.size, axis.num_key_value_heads, "key/value heads")
    return query_heads.repeat_interleave(width, dim=0).repeat(axis.num_blocks, 1)


def qkv(axis: Axis) -> torch.Tensor:
    """Queries of all heads, then their keys, then their values."""
    query_heads = _query_heads_by_kv_head(axis)
    width = _divide(axis.size, axis.num_units + 2 * axis.num_key_value_heads, "query, key and value heads")
    # A query belongs to one head; the other columns are there because keys and values have several owners.
    query = torch.full((axis.num_units, query_heads.shape[1]), NO_OWNER)
    query[:, 0] = torch.arange(axis.num_units)
    heads = torch.cat((query, query_heads, query_heads))
    return heads.repeat_interleave(width, dim=0).repeat(axis.num_blocks, 1)


def experts(axis: Axis) -> torch.Tensor:
    """Block e has units [e * U / E, (e + 1) * U / E), each a run of its axis."""
    units_per_block = _divide(axis.num_units, axis.num_blocks, "experts")
    return _number_by_block(_equal_runs(axis.size, units_per_block), units_per_block, axis.num_blocks)


def experts_gate_up(axis: Axis) -> torch.Tensor:
    """Block e has its units twice: gate projection, then up projection of an expert."""
    units_per_block = _divide(axis.num_units, axis.num_blocks, "experts")
    width = _divide(axis.size, 2, "gate and up projections")
    owners = _equal_runs(width, units_per_block).repeat(2)
    return _number_by_block(owners, units_per_block, axis.num_blocks)


AXIS_LAYOUTS: dict[str, AxisLayout] = {
    "contiguous": contiguous,
    "gate_up": gate_up,
    "kv": kv,
    "qkv": qkv,
    "experts": experts,
    "experts_gate_up": experts_gate_up,
}


def _equal_runs(size: int, num_units: int) -> torch.Tensor:
    """(A,): units 0 .. U - 1 in order, each for A / U entries."""
    return torch.arange(num_units).repeat_interleave(_divide(size, num_units, "units"))


def _number_by_block(owners: torch.Tensor, units_per_block: int, num_blocks: int) -> torch.Tensor:
    """(E * A, 1): the owners (A,) of one block, numbered on from block to block."""
    first_units = units_per_block * torch.arange(num_blocks)
    return (owners[None, :] + first_units[:, None]).reshape(-1, 1)


def _query_heads_by_kv_head(axis: Axis) -> torch.Tensor:
    """(key/value heads, query heads of each)."""
    group_size = _divide(axis.num_units, axis.num_key_value_heads, "key/value heads")
    return torch.arange(axis.num_units).view(axis.num_key_value_heads, group_size)


def _divide(size: int, divisor: int, name: str) -> int:
    if not divisor or size % divisor:
        raise ValueError(f"{size} entries, which is no multiple of {divisor} {name}")
    return size // divisor
