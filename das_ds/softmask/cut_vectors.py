"""Cut vectors: vectors of masked matrices of which several ranks hold fragments, completed by one of these ranks each.

The ranks that share a vector send their fragments to its owner, which is one of them. The owner multiplies the complete
vector, as it does those that no shard cuts, and sends the fragments of the result back. A fragment of m elements costs
its rank m numbers there and m back in the type of the vectors, whatever the projector and the number of sharers, and
nothing where the rank owns the vector itself; only owners need the projector.

Shape legend: n vectors, d elements of a vector, m of a fragment, E elements that a rank sends, R that it receives.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping

import torch

from das_ds.distributed.neighbor_exchange import Outgoing
from das_ds.engine.matmul_precision import tf32
from das_ds.functional.projectors import VectorMap
from das_ds.softmask.fragments import Fragment
from das_ds.softmask.projection import project_


class CutVectors:
    """One rank's part of a round: which fragments it sends where, and which vectors it completes.

    Args:
        fragments: of all ranks in this round.
        rank: this one.
        num_ranks: all of them.
    """

    def __init__(self, fragments: list[Fragment], rank: int, num_ranks: int) -> None:
        # Sorting keeps the order of fragments of one sender and owner, which both of them know.
        self.sent = sorted((f for f in fragments if f.sender == rank), key=lambda fragment: fragment.owner)
        """This rank's fragments in the order in which they travel."""
        self._arriving = sorted((f for f in fragments if f.owner == rank), key=lambda fragment: fragment.sender)
        self.send_sizes = _sizes(((f.owner, f.block.numel) for f in self.sent), num_ranks)
        """Elements to every rank; E together."""
        self.receive_sizes = _sizes(((f.sender, f.block.numel) for f in self._arriving), num_ranks)
        """Elements from every rank; R together."""
        self.num_vectors: dict[str, int] = {}
        """Input -> n vectors that this rank completes, all matrices with this input together."""
        self.widths: dict[str, int] = {}
        """Input of these -> d."""
        self._first_rows: dict[tuple[str, int], int] = {}
        """(matrix, first of consecutive vectors) -> their first row among the n."""
        self._place_vectors()

    def _place_vectors(self) -> None:
        for fragment in self._arriving:
            matrix = fragment.block.matrix
            key = (matrix.name, fragment.owned.start)
            if key not in self._first_rows:
                self._first_rows[key] = self.num_vectors.get(matrix.input, 0)
                self.num_vectors[matrix.input] = self._first_rows[key] + len(fragment.owned)
                self.widths[matrix.input] = matrix.width

    def complete(
        self,
        fragments: list[torch.Tensor],
        dtype: torch.dtype,
        projectors: Mapping[str, VectorMap],
        device: torch.device,
    ) -> Generator[Outgoing, torch.Tensor, list[torch.Tensor]]:
        """The fragments of x P from those of x; two exchanges, see `neighbor_exchange`.

        Args:
            fragments: (n, m) or (m,) for each of `sent`.
            dtype: of the vectors, also where this rank sends none.
            projectors: input -> P, of the vectors that this rank completes.
            device: of projectors and exchanges.

        Returns:
            (n, m), or (m,) of a single vector, for each of `sent`, where they came from.
        """
        if fragments:
            values = torch.cat([fragment.reshape(-1) for fragment in fragments]).to(device)
        else:
            values = torch.empty(0, dtype=dtype, device=device)
        received = yield Outgoing(values, self.send_sizes, self.receive_sizes)
        with tf32(device):
            self._project_(received, projectors)
        returned = yield Outgoing(received, self.receive_sizes, self.send_sizes)
        return _split(returned.to(fragments[0].device), self.sent) if fragments else []

    def _project_(self, received: torch.Tensor, projectors: Mapping[str, VectorMap]) -> None:
        """Fragments that arrived (R,) -> these fragments of the products, in place."""
        sizes = [self.num_vectors[name] * self.widths[name] for name in self.num_vectors]
        complete = received.new_empty(sum(sizes)).split(sizes)
        by_input = {
            name: vectors.view(-1, self.widths[name]) for name, vectors in zip(self.num_vectors, complete, strict=True)
        }
        pieces = _split(received, self._arriving)
        places = [self._place(by_input, fragment) for fragment in self._arriving]
        if pieces:
            torch._foreach_copy_(places, pieces)
        for name, vectors in by_input.items():
            project_(vectors, projectors[name])
        if pieces:
            torch._foreach_copy_(pieces, places)

    def _place(self, by_input: dict[str, torch.Tensor], fragment: Fragment) -> torch.Tensor:
        block = fragment.block
        row = self._first_rows[block.matrix.name, fragment.owned.start] + block.vectors.start - fragment.owned.start
        vectors = by_input[block.matrix.input]
        return vectors[row : row + len(block.vectors), block.columns.start : block.columns.stop].squeeze(0)


def _sizes(numels: Iterable[tuple[int, int]], num_ranks: int) -> list[int]:
    sizes = [0] * num_ranks
    for rank, numel in numels:
        sizes[rank] += numel
    return sizes


def _split(values: torch.Tensor, fragments: list[Fragment]) -> list[torch.Tensor]:
    # A single vector is one-dimensional: strides of several, which the same views elsewhere have, would not match, and
    # one launch for all copies needs equal strides.
    pieces = values.split([fragment.block.numel for fragment in fragments])
    shapes = [(len(fragment.block.vectors), len(fragment.block.columns)) for fragment in fragments]
    return [piece.view(shape).squeeze(0) for piece, shape in zip(pieces, shapes, strict=True)]
