"""Owners of moments and groups of inputs, for every number of ranks, by brute force over single elements."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from das_ds.distributed.state import Shard
from das_ds.softmask.input_layout import (
    InputLayout,
    assign_owners,
    build_input_layout,
    count_stepped,
    group_inputs,
    moment_bytes,
)
from das_ds.softmask.masked_matrix import MaskedMatrix

NUM_LAYERS = 4
HIDDEN = 6
INNER = 10


def make_matrices() -> list[MaskedMatrix]:
    """Four layers of queries, keys and values with one input, and two matrices more."""
    found = []
    for layer in range(NUM_LAYERS):
        for name in ("q", "k", "v"):
            found.append(MaskedMatrix(f"{layer}.{name}", f"{layer}.{name}", 0, HIDDEN, HIDDEN, f"{layer}.q"))
        found.append(MaskedMatrix(f"{layer}.up", f"{layer}.up", 0, INNER, HIDDEN, f"{layer}.up"))
        found.append(MaskedMatrix(f"{layer}.down", f"{layer}.down", 0, HIDDEN, INNER, f"{layer}.down"))
    return found


def divide_flat(world_size: int) -> list[list[Shard]]:
    """Shards of ZeRO 1 and 2: all parameters in a row, cut into equal parts."""
    flat = torch.empty(0)
    total = sum(matrix.numel for matrix in make_matrices())
    size = -(-total // world_size)
    shards: list[list[Shard]] = [[] for _ in range(world_size)]
    position = 0
    for matrix in make_matrices():
        for rank in range(world_size):
            first = max(position, rank * size)
            last = min(position + matrix.numel, (rank + 1) * size)
            if first < last:
                shards[rank].append(Shard(matrix.parameter, flat, 0, first - position, last - first))
        position += matrix.numel
    return shards


def divide_each(world_size: int) -> list[list[Shard]]:
    """Shards of ZeRO 3: every parameter is cut into equal parts, the last one shorter or missing."""
    flat = torch.empty(0)
    shards: list[list[Shard]] = [[] for _ in range(world_size)]
    for matrix in make_matrices():
        size = -(-matrix.numel // world_size)
        for rank in range(world_size):
            numel = min(size, matrix.numel - rank * size)
            if numel > 0:
                shards[rank].append(Shard(matrix.parameter, flat, 0, rank * size, numel))
    return shards


def build_layouts(shards: list[list[Shard]]) -> list[InputLayout]:
    """The layout as each rank builds it."""
    counts = [count_stepped(make_matrices(), own) for own in shards]
    ranks: Any = SimpleNamespace(all_gather_object=lambda _: counts)
    return [build_input_layout(make_matrices(), own, ranks) for own in shards]


@pytest.mark.parametrize("divide", [divide_flat, divide_each])
@pytest.mark.parametrize("world_size", [*range(1, 18), 31, 32, 64, 97])
def test_owner_steps_most_elements(divide: Any, world_size: int) -> None:
    shards = divide(world_size)
    layouts = build_layouts(shards)
    assert all(layout == layouts[0] for layout in layouts)
    layout = layouts[0]
    inputs = {matrix.parameter: matrix.input for matrix in make_matrices()}
    # (input, rank) -> elements, one at a time.
    counts: Counter[tuple[str, int]] = Counter()
    for rank, own in enumerate(shards):
        for shard in own:
            counts[inputs[shard.name], rank] += len(range(shard.numel))
    for name, owner in layout.owners.items():
        assert counts[name, owner] == max(counts[name, rank] for rank in range(world_size))
        assert layout.users[name] == tuple(rank for rank in range(world_size) if counts[name, rank])
        assert owner in layout.users[name]
    assert sorted(name for rank in range(world_size) for name in layout.owned_by(rank)) == sorted(layout.widths)
    assert layout.widest == INNER


@pytest.mark.parametrize("world_size", range(1, 98))
def test_owners_of_equal_shares_are_balanced(world_size: int) -> None:
    """Stage 0, where all step everything: no rank owns more than the mean plus one moment."""
    widths = {matrix.input: matrix.width for matrix in make_matrices()}
    everything = count_stepped(make_matrices(), divide_flat(1)[0])
    owners = assign_owners(widths, [everything] * world_size)
    owned = [sum(moment_bytes(widths[name]) for name in owners if owners[name] == rank) for rank in range(world_size)]
    assert max(owned) <= sum(owned) / world_size + moment_bytes(INNER)
    # Equal inputs of equal width take turns.
    alike = {f"{number}": 3 for number in range(200)}
    turns = assign_owners(alike, [dict.fromkeys(alike, 1)] * world_size)
    assert [turns[f"{number}"] for number in range(200)] == [number % world_size for number in range(200)]


def test_count_stepped_of_experts_and_cropped_rows() -> None:
    """Two matrices in one parameter, of which a shard may contain a part; rows beyond a matrix do not count."""
    experts = [MaskedMatrix(f"w[{e}]", "w", e * 20, 4, 5, f"x{e}") for e in range(2)]
    head = MaskedMatrix("head", "head", 0, 3, 5, "h")
    flat = torch.empty(0)
    shards = [Shard("w", flat, 0, 7, 20), Shard("head", flat, 20, 14, 10), Shard("bias", flat, 30, 0, 4)]
    assert count_stepped([*experts, head], shards) == {"x0": 13, "x1": 7, "h": 1}


def test_group_inputs_fits_budget() -> None:
    widths = {"a": 1, "b": 2, "c": 1, "d": 3, "e": 1}
    # In the first group with room: 4 + 16 + 4 + 4 and 36 bytes.
    assert group_inputs(widths, 40) == [["a", "b", "c", "e"], ["d"]]
    # One that is larger than the budget makes room for as many bytes in every group.
    assert group_inputs(widths, 4) == [["a", "b", "c", "e"], ["d"]]
    assert group_inputs({"a": 2, "b": 2, "c": 1}, 4) == [["a"], ["b"], ["c"]]
    assert group_inputs(widths, 10**9) == [list(widths)]
    assert group_inputs({}, 1) == []
