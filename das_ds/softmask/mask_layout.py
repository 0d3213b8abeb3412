"""Layout of a mask of directions: which vectors a rank multiplies alone, and which it completes with others.

Computed once for a mask, never in a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch.distributed as dist

from das_ds.distributed.collectives import in_collective, world_size
from das_ds.softmask.cut_vectors import CutVectors
from das_ds.softmask.fragments import MAX_ROUND_ELEMENTS, Fragment, split_into_rounds
from das_ds.softmask.masked_matrix import MaskedMatrix
from das_ds.softmask.matrix_blocks import Block, HeldElements
from das_ds.softmask.projection import num_vectors_at_once


@dataclass(frozen=True)
class PlacedBlock:
    """A block that lies in one of a rank's shards."""

    shard: int
    block: Block


@dataclass(frozen=True)
class Batch:
    """Complete vectors of matrices with the same input, multiplied in one product."""

    input: str
    blocks: list[PlacedBlock]


@dataclass(frozen=True)
class MaskLayout:
    """What one rank does to multiply its part of all vectors."""

    batches: list[Batch]
    """Complete vectors."""
    rounds: list[CutVectors]
    """Of cut vectors; as many on every rank."""


def gather_cut_elements(held: Iterable[HeldElements], matrices: list[MaskedMatrix]) -> list[list[HeldElements]]:
    """Rank -> what it holds of matrices with vectors that it has not completely; a collective.

    Args:
        held: what this rank's shards hold.
        matrices: all that are masked, in the same order on every rank.
    """
    own = [item for item in held if not all(block.is_complete for block in item.blocks(matrices))]
    if world_size() == 1:
        return [own]
    gathered: list[list[HeldElements]] = [[] for _ in range(world_size())]
    with in_collective():
        dist.all_gather_object(gathered, own)
    return gathered


def plan_layout(
    matrices: list[MaskedMatrix],
    held: Iterable[HeldElements],
    fragments: Iterable[list[Fragment]],
    rank: int,
    num_ranks: int,
) -> MaskLayout:
    """The layout of one rank; not a collective.

    Args:
        matrices: in the order that numbers refer to.
        held: what the rank's shards hold of those that are multiplied.
        fragments: of these on all ranks, in the same order on every rank; see `find_fragments`.
        rank: whose layout it is.
        num_ranks: all of them.
    """
    rounds = split_into_rounds(fragments, MAX_ROUND_ELEMENTS)
    complete = (PlacedBlock(item.shard, block) for item in held for block in item.blocks(matrices) if block.is_complete)
    return MaskLayout(make_batches(complete), [CutVectors(of_round, rank, num_ranks) for of_round in rounds])


def make_batches(blocks: Iterable[PlacedBlock]) -> list[Batch]:
    """Batches of at most `num_vectors_at_once` vectors, so that few vectors of several matrices are one product."""
    by_input: dict[str, list[PlacedBlock]] = {}
    for placed in blocks:
        by_input.setdefault(placed.block.matrix.input, []).append(placed)
    batches = []
    for name, of_input in by_input.items():
        limit = num_vectors_at_once(of_input[0].block.matrix.width)
        room = 0
        for placed in of_input:
            for part in placed.block.split(limit):
                if len(part.vectors) > room:
                    batches.append(Batch(name, []))
                    room = limit
                batches[-1].blocks.append(PlacedBlock(placed.shard, part))
                room -= len(part.vectors)
    return batches
