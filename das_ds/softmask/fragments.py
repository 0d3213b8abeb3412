"""Fragments of vectors that shards cut, and which of the ranks that share a vector completes it."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from das_ds.softmask.masked_matrix import MaskedMatrix
from das_ds.softmask.matrix_blocks import Block, HeldElements

MAX_ROUND_ELEMENTS = 1 << 24
"""Elements that a rank sends, or that it completes, in one round, unless one matrix has more: 64 MiB in float32 for
each of four buffers. One round is enough but for large transposed matrices, of which every vector is cut."""


@dataclass(frozen=True)
class Fragment:
    """Fragments of consecutive vectors that one rank holds, at equal columns, and that one rank completes."""

    sender: int
    """Rank that holds them."""
    shard: int
    """Which of the sender's shards they lie in."""
    owner: int
    """Rank that completes the vectors."""
    owned: range
    """All neighboring vectors that the owner completes, these among them."""
    block: Block


def find_fragments(
    matrices: list[MaskedMatrix], held_by_rank: Sequence[Iterable[HeldElements]]
) -> dict[int, list[Fragment]]:
    """Number of a matrix -> fragments of its cut vectors on all ranks; the same on every rank.

    Args:
        matrices: in the order that the numbers refer to.
        held_by_rank: what shards hold; those without incomplete vectors may be missing.
    """
    parts_by_matrix: dict[int, list[_Part]] = {}
    for rank, all_held in enumerate(held_by_rank):
        for held in all_held:
            parts = [_Part(rank, held.shard, block) for block in held.blocks(matrices) if not block.is_complete]
            if parts:
                parts_by_matrix.setdefault(held.matrix, []).extend(parts)
    found = {}
    completed: Counter[int] = Counter()
    """Rank -> elements that it completes of the matrices so far."""
    for number in sorted(parts_by_matrix):
        parts = parts_by_matrix[number]
        owners = _share_columns(parts) if matrices[number].transposed else _share_rows(parts, completed)
        found[number] = list(_assign(parts, owners))
        for fragment in found[number]:
            completed[fragment.owner] += fragment.block.numel
    return found


@dataclass(frozen=True)
class _Part:
    """A block of incomplete vectors that a rank holds."""

    rank: int
    shard: int
    block: Block


@dataclass(frozen=True)
class _Owned:
    """Consecutive vectors that one rank completes."""

    rank: int
    vectors: range


def _share_rows(parts: list[_Part], completed: Mapping[int, int]) -> list[_Owned]:
    """Rows, of which ranks cut few: the rank with most of a row completes it, so that least has to travel.

    Of ranks with equally much that one completes it which has completed least of the matrices before, then the lowest:
    where rows are as long as matrices and all ranks share all of them, the ranks take turns.
    """
    by_row: dict[int, list[_Part]] = {}
    for part in parts:
        by_row.setdefault(part.block.vectors.start, []).append(part)
    owned = []
    for row in sorted(by_row):
        largest = max(by_row[row], key=lambda part: (part.block.numel, -completed.get(part.rank, 0), -part.rank))
        owned.append(_Owned(largest.rank, range(row, row + 1)))
    return owned


def _share_columns(parts: list[_Part]) -> list[_Owned]:
    """Columns of a transposed matrix, of which all ranks cut all: each completes an equal number."""
    owned = []
    for vectors in _merge(part.block.vectors for part in parts):
        sharers = sorted({part.rank for part in parts if _overlap(part.block.vectors, vectors)})
        bounds = [vectors.start + len(vectors) * number // len(sharers) for number in range(len(sharers) + 1)]
        ranges = (range(bounds[i], bounds[i + 1]) for i in range(len(sharers)))
        owned += [_Owned(rank, part) for rank, part in zip(sharers, ranges, strict=True) if part]
    return owned


def _merge(ranges: Iterable[range]) -> list[range]:
    """The union of ranges as ranges that do not touch."""
    merged: list[range] = []
    for item in sorted(ranges, key=lambda item: item.start):
        if merged and item.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, item.stop))
        else:
            merged.append(item)
    return merged


def _overlap(first: range, second: range) -> range:
    return range(max(first.start, second.start), min(first.stop, second.stop))


def _assign(parts: list[_Part], owners: list[_Owned]) -> Iterator[Fragment]:
    num_missing = sum(len(owned.vectors) for owned in owners) * parts[0].block.matrix.width
    # In order and apart from each other.
    starts = [owned.vectors.start for owned in owners]
    for part in parts:
        number = bisect_right(starts, part.block.vectors.start) - 1
        while number < len(owners) and (vectors := _overlap(part.block.vectors, owners[number].vectors)):
            block = part.block.with_vectors(vectors)
            num_missing -= block.numel
            yield Fragment(part.rank, part.shard, owners[number].rank, owners[number].vectors, block)
            number += 1
    assert num_missing == 0, f"{parts[0].block.matrix.name}: every element of a cut vector lies in one shard"


def split_into_rounds(fragments: Iterable[list[Fragment]], max_elements: int) -> list[list[Fragment]]:
    """Fragments of matrices -> those of each round; the same on every rank.

    Args:
        fragments: of every matrix in turn.
        max_elements: that a rank sends or completes in a round, unless one matrix has more.
    """
    rounds: list[list[Fragment]] = []
    loads: Counter[tuple[str, int]] = Counter()
    for of_matrix in fragments:
        added: Counter[tuple[str, int]] = Counter()
        for fragment in of_matrix:
            added["sends", fragment.sender] += fragment.block.numel
            added["completes", fragment.owner] += fragment.block.numel
        loads += added
        if not rounds or max(loads[key] for key in added) > max_elements:
            rounds.append([])
            loads = added
        rounds[-1] += of_matrix
    return rounds
