"""Frozen subspaces of hidden matrices: computed from the weights, stored, and kept out of all further updates.

A projection on both sides needs a complete matrix. To masks a matrix is therefore one long vector
(`HiddenMatrix.as_vector`): a rank that has all of it projects it alone; of a matrix that shards cut, one of the ranks
that share it is sent the fragments of the others, projects it, and sends theirs back (`cut_vectors`), many matrices at
once. Only the rank that projects a matrix has its subspaces.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from das_ds.distributed.neighbor_exchange import run_exchanges
from das_ds.distributed.process_group import ProcessGroup
from das_ds.distributed.state import ComponentState, SavedComponentState, Shard
from das_ds.engine.engine import Engine
from das_ds.functional.projectors import LowRankProjector
from das_ds.functional.subspaces import TwoSidedProjector, freeze_leading_directions, num_frozen_directions
from das_ds.softmask.apply import clear_masks, mask_directions
from das_ds.softmask.direction_mask import build_direction_mask
from das_ds.softmask.hidden_matrices import HiddenMatrix
from das_ds.softmask.projector_exchange import share_projector


@dataclass(frozen=True)
class SubspaceLayout:
    """Which ranks project which matrices; the same on every rank."""

    matrices: tuple[HiddenMatrix, ...]
    users: dict[str, tuple[int, ...]]
    """Matrix -> the ranks that project it, ascending: all at ZeRO stage 0, else one."""
    owners: dict[str, int]
    """Matrix -> the one of them that decomposes and stores it."""

    def used_by(self, rank: int) -> list[str]:
        """The matrices that a rank projects."""
        return [name for name, users in self.users.items() if rank in users]


def build_subspace_layout(
    matrices: Sequence[HiddenMatrix], shards: Sequence[Shard], ranks: ProcessGroup
) -> SubspaceLayout:
    """The layout of these matrices over the ranks; a collective.

    Args:
        matrices: the same on every rank.
        shards: this rank's.
        ranks: the process group.
    """
    vectors = [matrix.as_vector() for matrix in matrices]
    layout = build_direction_mask(shards, vectors, {}, ranks.info.device).layout
    own = {batch.input for batch in layout.batches}
    own |= {name for cut in layout.rounds for name in cut.num_vectors}
    projected = ranks.all_gather_object(own)
    users = {m.name: tuple(rank for rank, names in enumerate(projected) if m.name in names) for m in matrices}
    owners = {name: of_matrix[number % len(of_matrix)] for number, (name, of_matrix) in enumerate(users.items())}
    return SubspaceLayout(tuple(matrices), users, owners)


class FrozenSubspaces:
    """The subspaces of one domain.

    Args:
        engine: whose weights they are.
        layout: of its matrices.
        projectors: matrix -> its projector on the device, of those that this rank projects.
    """

    def __init__(self, engine: Engine, layout: SubspaceLayout, projectors: Mapping[str, TwoSidedProjector]) -> None:
        self._engine = engine
        self._layout = layout
        self.projectors = projectors

    @classmethod
    def decompose(cls, engine: Engine, layout: SubspaceLayout, unfreeze_rank_ratio: float) -> FrozenSubspaces:
        """The subspaces of the present weights; a collective. Further steps are not masked until `mask` is called.

        Each matrix is decomposed by one rank, on its device. At ZeRO stage 0, where all ranks project all matrices,
        they take turns and share the results, so that their weights remain equal to the last bit.

        Args:
            engine: whose fp32 weights are decomposed.
            layout: of its matrices.
            unfreeze_rank_ratio: fraction of the singular directions that is not frozen.
        """
        # Earlier subspaces may be as large as the new ones: both need not fit in memory.
        clear_masks(engine)
        info = engine.ranks.info
        shards = engine.weights.shards
        decompositions = {
            matrix.name: _Decomposition(matrix, unfreeze_rank_ratio, is_own=layout.owners[matrix.name] == info.rank)
            for matrix in layout.matrices
        }
        # Weights reach the rank that decomposes them as gradients and updates will.
        visit = build_direction_mask(shards, [m.as_vector() for m in layout.matrices], decompositions, info.device)
        run_exchanges(visit.steps([shard.values for shard in shards], _leave_unchanged))
        projectors = {}
        for name, decomposition in decompositions.items():
            shared = _share(decomposition.projector, layout.owners[name], layout.users[name], info.device)
            if shared is not None:
                projectors[name] = shared
        return cls(engine, layout, projectors)

    def mask(self) -> None:
        """Project gradients and updates of all further steps of the engine, and mask nothing else; a collective."""
        clear_masks(self._engine)
        vectors = [matrix.as_vector() for matrix in self._layout.matrices]
        mask_directions(self._engine, vectors, self.projectors, apply_to="both")

    def state_dict(self) -> ComponentState:
        """What this rank decomposed; copied to host memory from a GPU."""
        rank = self._engine.ranks.info.rank
        owned: dict[str, torch.Tensor] = {}
        for name, projector in self.projectors.items():
            if self._layout.owners[name] == rank:
                for side, values in (("left", projector.left), ("right", projector.right)):
                    basis, gains, tail = _tensor_names(name, side)
                    owned |= {basis: values.basis.cpu(), gains: values.gains.cpu(), tail: torch.tensor([values.tail])}
        return ComponentState(owned=owned)

    @classmethod
    def load_state_dict(
        cls, engine: Engine, layout: SubspaceLayout, saved: SavedComponentState
    ) -> FrozenSubspaces | None:
        """Each rank reads those of the matrices that it projects, whoever stored them; None where none were stored."""
        if not saved.owned_names():
            return None
        info = engine.ranks.info
        projectors = {}
        for name in layout.used_by(info.rank):
            sides = []
            for side in ("left", "right"):
                names = _tensor_names(name, side)
                found = saved.owned(names)
                basis, gains, tail = (found[tensor] for tensor in names)
                sides.append(LowRankProjector(basis.to(info.device), gains.to(info.device), float(tail)))
            projectors[name] = TwoSidedProjector(*sides)
        return cls(engine, layout, projectors)


class _Decomposition:
    """In place of a projector: decomposes the matrix that it is given, where that is up to this rank.

    Args:
        matrix: which one it is.
        unfreeze_rank_ratio: see `FrozenSubspaces.decompose`.
        is_own: whether this rank decomposes it.
    """

    def __init__(self, matrix: HiddenMatrix, unfreeze_rank_ratio: float, *, is_own: bool) -> None:
        self._matrix = matrix
        self._num_frozen = num_frozen_directions(matrix.num_rows, matrix.num_columns, unfreeze_rank_ratio)
        self._is_own = is_own
        self.width = matrix.numel
        self.projector: TwoSidedProjector | None = None

    def project(self, vectors: torch.Tensor) -> torch.Tensor:
        """The matrix (1, o d) as it is."""
        if self._is_own:
            matrix = vectors.view(self._matrix.num_rows, self._matrix.num_columns)
            self.projector = freeze_leading_directions(matrix, self._num_frozen)
        return vectors


def _leave_unchanged(views: Iterable[torch.Tensor], products: Iterable[torch.Tensor]) -> None:
    """In place of writing products."""


def _share(
    projector: TwoSidedProjector | None, owner: int, users: Sequence[int], device: torch.device
) -> TwoSidedProjector | None:
    """See `share_projector`."""
    left = share_projector(None if projector is None else projector.left, owner, users, device)
    right = share_projector(None if projector is None else projector.right, owner, users, device)
    if left is None or right is None:
        return None
    assert isinstance(left, LowRankProjector) and isinstance(right, LowRankProjector), "what was sent"
    return TwoSidedProjector(left, right)


def _tensor_names(matrix: str, side: str) -> tuple[str, str, str]:
    """Of basis, gains and tail of one side in checkpoints."""
    return f"{matrix}/{side}/basis", f"{matrix}/{side}/gains", f"{matrix}/{side}/tail"
