"""What every rank steps of the masked matrices of a planned run, and what it exchanges: ZeRO's arithmetic, no ranks.

Shape legend: d elements of a vector, W ranks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from das_ds.models.size import MatrixSize, ModelSize, Sharding
from das_ds.softmask.fragments import find_fragments
from das_ds.softmask.masked_matrix import MaskedMatrix
from das_ds.softmask.matrix_blocks import HeldElements


class Part(NamedTuple):
    """Consecutive elements that one rank steps."""

    rank: int
    begin: int
    end: int


@dataclass
class RankLoad:
    """One rank's part of the masked matrices, in elements."""

    stepped: Counter[str] = field(default_factory=Counter)
    """Input -> elements of the matrices that read it."""
    num_matrices: Counter[str] = field(default_factory=Counter)
    """Input -> of how many matrices."""
    fragments: int = 0
    """Of vectors that it does not have completely."""
    completed: int = 0
    """Of cut vectors that it completes, its own fragments among them."""
    sent: int = 0
    """To other ranks in both exchanges of a pass over all vectors."""
    owned: set[str] = field(default_factory=set)
    """Inputs of the cut vectors that it completes."""


def plan_loads(size: ModelSize, sharding: Sharding) -> tuple[RankLoad, ...]:
    """The load of every rank; at stage 0 only of one, as all have the same.

    Args:
        size: of the network, with its parameters and matrices.
        sharding: of the optimizer.
    """
    return _plan_loads(size.parameters, size.matrices, sharding.stage, sharding.num_ranks)


# Memory, operations and exchanges of one plan ask for the same loads.
@lru_cache(maxsize=4)
def _plan_loads(
    parameters: tuple[tuple[int, int], ...], matrices: tuple[MatrixSize, ...], stage: int, num_ranks: int
) -> tuple[RankLoad, ...]:
    loads = [RankLoad() for _ in range(num_ranks if stage >= 1 else 1)]
    parts_of = divide_parameters(parameters, stage, num_ranks)
    for matrix in matrices:
        parts = _within(parts_of[matrix.parameter], matrix)
        for part in parts:
            loads[part.rank].stepped[matrix.input] += part.end - part.begin
            loads[part.rank].num_matrices[matrix.input] += 1
        if len(parts) > 1:
            _add_cut_vectors(loads, matrix, parts)
    return tuple(loads)


def divide_parameters(parameters: Sequence[tuple[int, int]], stage: int, num_ranks: int) -> list[list[Part]]:
    """Parameter -> its parts in order, as DeepSpeed 0.19.8 divides them.

    | stage | division |
    |-------|----------|
    | 0     | none; the one part stands for every rank |
    | 1, 2  | the parameters of a group in a row: equal parts, a multiple of two elements each |
    | 3     | every parameter in equal parts |

    Args:
        parameters: (elements, group of the optimizer) in the engine's order.
        stage: ZeRO stage.
        num_ranks: W.
    """
    if stage == 0:
        return [[Part(0, 0, numel)] for numel, _ in parameters]
    if stage == 3:
        return [list(_divide(0, numel, -(-numel // num_ranks))) for numel, _ in parameters]
    totals: Counter[int] = Counter()
    for numel, group in parameters:
        totals[group] += numel
    positions: Counter[int] = Counter()
    found = []
    for numel, group in parameters:
        part_size = -(-totals[group] // (2 * num_ranks)) * 2
        found.append(list(_divide(positions[group], numel, part_size)))
        positions[group] += numel
    return found


def _divide(position: int, numel: int, part_size: int) -> Iterator[Part]:
    """Parts of a parameter that begins at a position of what is divided into parts of one size."""
    for rank in range(position // part_size, -(-(position + numel) // part_size)):
        begin = max(rank * part_size - position, 0)
        yield Part(rank, begin, min((rank + 1) * part_size - position, numel))


def _within(parts: list[Part], matrix: MatrixSize) -> list[Part]:
    """The parts of a matrix of its parameter."""
    end = matrix.start + matrix.numel
    first = bisect_right(parts, matrix.start, key=lambda part: part.end)
    found = []
    for part in parts[first:]:
        if part.begin >= end:
            break
        found.append(Part(part.rank, max(part.begin - matrix.start, 0), min(part.end - matrix.start, matrix.numel)))
    return found


def _add_cut_vectors(loads: list[RankLoad], matrix: MatrixSize, parts: list[Part]) -> None:
    if matrix.transposed:
        for sender, owner, numel in _column_fragments(matrix, parts):
            _add_fragment(loads, matrix, sender, owner, numel)
        return
    rows: dict[int, list[tuple[int, int]]] = {}
    """Row -> (elements, rank) of its fragments."""
    for part in parts:
        for row in {part.begin // matrix.width, (part.end - 1) // matrix.width}:
            first = row * matrix.width
            numel = min(part.end, first + matrix.width) - max(part.begin, first)
            if numel < matrix.width:
                rows.setdefault(row, []).append((numel, part.rank))
    # Of a matrix at once, as ranks are chosen by what they complete of the matrices before it.
    completed = [load.completed for load in loads]
    for fragments in rows.values():
        _, owner = max(fragments, key=lambda fragment: (fragment[0], -completed[fragment[1]], -fragment[1]))
        for numel, sender in fragments:
            _add_fragment(loads, matrix, sender, owner, numel)


def _column_fragments(matrix: MatrixSize, parts: list[Part]) -> Iterator[tuple[int, int, int]]:
    """(sender, owner, elements) of a matrix stored by columns, whose every vector is cut."""
    masked = MaskedMatrix("", "", 0, matrix.num_outputs, matrix.width, "", transposed=True)
    held: list[list[HeldElements]] = [[] for _ in range(parts[-1].rank + 1)]
    for part in parts:
        held[part.rank].append(HeldElements(0, 0, part.begin, part.end))
    for fragment in find_fragments([masked], held).get(0, []):
        yield fragment.sender, fragment.owner, fragment.block.numel


def _add_fragment(loads: list[RankLoad], matrix: MatrixSize, sender: int, owner: int, numel: int) -> None:
    loads[sender].fragments += numel
    loads[owner].owned.add(matrix.input)
    loads[owner].completed += numel
    if sender != owner:
        # There, and the fragment of the product back.
        loads[sender].sent += numel
        loads[owner].sent += numel
