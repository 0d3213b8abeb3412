"""Moments of the inputs of masked matrices, each held by one rank, and the projectors that are computed from them.

Shape legend: d width of an input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self, TypeVar

import torch

from das_ds.distributed.process_group import ProcessGroup
from das_ds.errors import DasError
from das_ds.functional.directions import (
    OverDomains,
    Rank,
    build_projector,
    joint_saturation,
    projector_work_bytes,
)
from das_ds.functional.projectors import Projector, VectorMap
from das_ds.functional.units import UnitLayout
from das_ds.softmask.directions_file import load_directions, save_directions
from das_ds.softmask.input_layout import InputLayout
from das_ds.softmask.projector_exchange import find_room, move_projector, share_projector

V = TypeVar("V", bound=VectorMap)


class DirectionMoments:
    """M of every input: the sum over domains of its normalized second moments. Each is held by one rank, its owner.

    Args:
        ranks: the process group.
        inputs: layout of the inputs.
        moments: input -> M, (d, d) float32 in host memory on its owner, None on other ranks; with the same names on
            every rank. The tensors are never changed, as a checkpoint that is being written may still read them.
        num_tokens: of the vocabulary that the moments were measured with; None: the vocabulary does not grow.
        dtype: of the vectors that are projected.
    """

    def __init__(
        self,
        ranks: ProcessGroup,
        inputs: InputLayout,
        moments: dict[str, torch.Tensor | None],
        num_tokens: int | None,
        dtype: torch.dtype,
    ) -> None:
        self._ranks = ranks
        self.inputs = inputs
        self._moments = moments
        self.num_tokens = num_tokens
        self._dtype = dtype

    def _replaced(self, moments: dict[str, torch.Tensor | None], num_tokens: int | None) -> Self:
        """The same with other moments."""
        return type(self)(self._ranks, self.inputs, moments, num_tokens, self._dtype)

    @property
    def moments(self) -> dict[str, torch.Tensor]:
        """Input -> M, of the inputs that this rank owns."""
        return {name: moment for name, moment in self._moments.items() if moment is not None}

    @property
    def names(self) -> list[str]:
        """The inputs that have a moment, on whichever rank; all but where measuring was interrupted."""
        return list(self._moments)

    def accumulate(self, earlier: Self | None) -> Self:
        """The sum with the moments of earlier domains, which is all that is left: both are used up.

        A sum takes the place of what it adds, one at a time: new tensors, because a checkpoint that is being written
        may still read the others.
        """
        if earlier is None:
            return self
        total: dict[str, torch.Tensor | None] = {}
        for name in self.names:
            latest = self._moments.pop(name)
            before = earlier._moments.pop(name)
            total[name] = None if latest is None or before is None else latest + before
        numbers = [self.num_tokens, earlier.num_tokens]
        num_tokens = None if None in numbers else max(number for number in numbers if number is not None)
        return self._replaced(total, num_tokens)

    def projectors(self, compute: Callable[[torch.Tensor], Projector]) -> Iterator[tuple[str, Projector]]:
        """(input, projector) of each input that this rank steps a matrix of, in turn; a collective.

        All ranks walk through the inputs in one order. An owner computes the projector on its device, one at a time,
        and sends it to the other ranks that step a matrix of the input: 4 d^2 bytes to each where it is dense. Its next
        one is computed before it waits for those of others, so that owners compute at the same time.
        At ZeRO stages 1 and 2 these are the few ranks whose shards meet there, at 0 and 3 all ranks (a broadcast). The
        caller has to take all: ranks wait for each other.

        Args:
            compute: M, (d, d) in host memory -> its projector on the device.
        """
        for name, projector in self.share(map(compute, self.moments.values())):
            if projector is not None:
                yield name, projector

    def share(self, computed: Iterator[V]) -> Iterator[tuple[str, V | None]]:
        """(input, what its owner computed) of all inputs in turn, None where this rank steps no matrix of it.

        A collective, in which owners compute and send as in `projectors`.

        Args:
            computed: of the inputs that this rank owns, in the order of `moments`.
        """
        device = self._ranks.info.device
        own_next = next(computed, None)
        for name, moment in self._moments.items():
            own = None if moment is None else own_next
            shared = share_projector(own, self.inputs.owners[name], self.inputs.users[name], device)
            if moment is not None:
                own_next = next(computed, None)
            yield name, shared

    def shared_projectors(
        self, half_saturation: float, rank: Rank = "full", over_domains: OverDomains = "sum"
    ) -> dict[str, Projector]:
        """P = (I + M / c)^-1 of each input that this rank steps a matrix of; a collective.

        Args:
            half_saturation: c.
            rank: of the projectors, see `build_projector`.
            over_domains: whether M is the sum over domains or their mean, see `joint_saturation`.
        """
        return dict(self.projectors(lambda moment: self._compute(moment, half_saturation, rank, over_domains)))

    def own_projectors(
        self, half_saturation: float, rank: Rank = "full", over_domains: OverDomains = "sum"
    ) -> Iterator[tuple[str, Projector]]:
        """(input, P) of each input that this rank owns, in turn; no other rank is asked.

        Args:
            half_saturation, rank, over_domains: as for `shared_projectors`.
        """
        for name, moment in self.moments.items():
            yield name, self._compute(moment, half_saturation, rank, over_domains)

    def _compute(
        self, moment: torch.Tensor, half_saturation: float, rank: Rank, over_domains: OverDomains
    ) -> Projector:
        """The projector of a moment in host memory, on this rank's device."""
        device = self._ranks.info.device
        where = find_room(device, projector_work_bytes(len(moment)))
        saturation = joint_saturation(moment, half_saturation, over_domains)
        return move_projector(build_projector(moment, saturation, rank, self._dtype, where), device)

    def write(self, path: Path, layout: UnitLayout, tokens: Sequence[str]) -> None:
        """Owners write their moments into one file; see `save_directions`."""
        save_directions(path, self.moments, self.inputs, layout, self._ranks, tokens)


def read_moments(
    path: Path, ranks: ProcessGroup, inputs: InputLayout, layout: UnitLayout, tokens: Sequence[str] | None
) -> tuple[dict[str, torch.Tensor | None], int]:
    """Each owner reads its moments; a collective.

    Args:
        path: of a directions file.
        ranks: the process group.
        inputs: layout of the inputs.
        layout, tokens: see `load_directions`.

    Returns:
        Input -> M on its owner, None elsewhere; and the number of tokens that there were when they were measured.

    Raises:
        ImportanceError: on every rank, when any cannot read them.
    """
    failure: DasError | None = None
    found: dict[str, torch.Tensor] = {}
    num_tokens = 0
    try:
        found, num_tokens = load_directions(path, inputs.owned_by(ranks.info.rank), inputs.widths, layout, tokens)
    except DasError as error:
        failure = error
    ranks.raise_on_all_ranks(failure)
    return {name: found.get(name) for name in inputs.widths}, num_tokens
