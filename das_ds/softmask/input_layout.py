"""Inputs of masked matrices: how wide they are, which rank owns the moment of each, and which ranks step its matrices.

Shape legend: d width of an input, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from das_ds.distributed.process_group import ProcessGroup
from das_ds.distributed.state import Shard
from das_ds.models.size import FP32
from das_ds.softmask.masked_matrix import MaskedMatrix
from das_ds.softmask.matrix_blocks import find_held_elements


@dataclass(frozen=True)
class InputLayout:
    """The inputs of a network's masked matrices, the same on every rank."""

    matrices: tuple[MaskedMatrix, ...]
    widths: dict[str, int]
    """Input -> d, in the order of the matrices."""
    owners: dict[str, int]
    """Input -> the rank that holds its moment."""
    users: dict[str, tuple[int, ...]]
    """Input -> the ranks that step a matrix which reads it, ascending."""

    def owned_by(self, rank: int) -> list[str]:
        """The inputs whose moments a rank holds."""
        return [name for name, owner in self.owners.items() if owner == rank]

    @property
    def widest(self) -> int:
        """The largest d."""
        return max(self.widths.values(), default=0)


def build_input_layout(matrices: Sequence[MaskedMatrix], shards: Iterable[Shard], ranks: ProcessGroup) -> InputLayout:
    """The layout of these matrices over the ranks; a collective.

    Args:
        matrices: the same on every rank.
        shards: this rank's.
        ranks: the process group.
    """
    widths = {matrix.input: matrix.width for matrix in matrices}
    stepped = ranks.all_gather_object(count_stepped(matrices, shards))
    users = {name: tuple(rank for rank, counts in enumerate(stepped) if counts.get(name)) for name in widths}
    return InputLayout(tuple(matrices), widths, assign_owners(widths, stepped), users)


def count_stepped(matrices: Iterable[MaskedMatrix], shards: Iterable[Shard]) -> dict[str, int]:
    """Input -> elements of the matrices reading it that lie in these shards; inputs without any are missing."""
    listed = list(matrices)
    counts: dict[str, int] = {}
    for held in find_held_elements(shards, listed):
        name = listed[held.matrix].input
        counts[name] = counts.get(name, 0) + held.end - held.begin
    return counts


def assign_owners(widths: Mapping[str, int], stepped: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Input -> its owner: the rank that steps most elements of the matrices that read it.

    Most projectors are then needed where they are computed. Ranks that step equally many (all of them at ZeRO stage 0,
    all but the last at stage 3) take turns: the one that owns the fewest bytes so far, and of these the lowest, owns
    the next. Without any ties at all, moments are spread as the weights are.

    Args:
        widths: input -> d, in the same order on every rank.
        stepped: of each rank, input -> elements; see `count_stepped`.
    """
    num_bytes = [0] * len(stepped)
    owners = {}
    for name, width in widths.items():
        counts = [by_input.get(name, 0) for by_input in stepped]
        most = max(counts)
        tied = [rank for rank, count in enumerate(counts) if count == most]
        owner = min(tied, key=lambda rank: (num_bytes[rank], rank))
        owners[name] = owner
        num_bytes[owner] += moment_bytes(width)
    return owners


def moment_bytes(width: int) -> int:
    """4 d^2."""
    return FP32 * width**2


def group_inputs(widths: Mapping[str, int], budget: int) -> list[list[str]]:
    """The inputs in groups that are measured one after the other.

    Each input joins the first group that has room for it. The sum of the widest input has to fit in any case, so that
    groups of narrow inputs may be as large.

    Args:
        widths: input -> d, in the same order on every rank.
        budget: bytes that the sums of a group, 4 d^2 each, may take.
    """
    sizes = {name: moment_bytes(width) for name, width in widths.items()}
    budget = max([budget, *sizes.values()])
    groups: list[list[str]] = []
    used: list[int] = []
    for name, needed in sizes.items():
        number = next((n for n, num_bytes in enumerate(used) if num_bytes + needed <= budget), len(groups))
        if number == len(groups):
            groups.append([])
            used.append(0)
        groups[number].append(name)
        used[number] += needed
    return groups
