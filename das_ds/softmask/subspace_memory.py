"""Memory, operations and exchanges of frozen subspaces, from the hidden matrices of a network and ZeRO's arithmetic.

Shape legend: o, d rows and columns of a matrix, m = min(o, d), k frozen directions, r_o and r_d vectors that the sides
are stored with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from das_ds.functional.subspaces import num_frozen_directions, stored_rank
from das_ds.models.size import FP32, Collective, MatrixSize, MemoryUse, ModelSize, Sharding, StepUse
from das_ds.softmask.direction_memory import gradient_element_bytes
from das_ds.softmask.fragments import MAX_ROUND_ELEMENTS
from das_ds.softmask.planned_shards import RankLoad, plan_loads
from das_ds.softmask.update_chunks import MAX_CHUNK_ELEMENTS


@dataclass(frozen=True)
class PlannedSubspaces:
    """Sizes of the two-sided projector of one matrix; see `functional.subspaces.TwoSidedProjector`."""

    num_rows: int
    num_columns: int
    left_rank: int
    """r_o."""
    right_rank: int
    """r_d."""

    @classmethod
    def plan(cls, matrix: MatrixSize, unfreeze_rank_ratio: float) -> PlannedSubspaces:
        """Those of a matrix (o, d)."""
        num_rows = matrix.num_outputs
        num_columns = matrix.width
        smaller = min(num_rows, num_columns)
        frozen = num_frozen_directions(num_rows, num_columns, unfreeze_rank_ratio)
        left = stored_rank(num_rows, smaller, frozen)
        return cls(num_rows, num_columns, left, stored_rank(num_columns, smaller, frozen))

    @property
    def numel(self) -> int:
        """o d."""
        return self.num_rows * self.num_columns

    @property
    def num_bytes(self) -> int:
        """4 (o + 1) r_o + 4 (d + 1) r_d."""
        return FP32 * ((self.num_rows + 1) * self.left_rank + (self.num_columns + 1) * self.right_rank)

    @property
    def flops(self) -> int:
        """4 o d (r_o + r_d) of one projection."""
        return 4 * self.numel * (self.left_rank + self.right_rank)

    @property
    def decomposition_bytes(self) -> int:
        """About 4 (2 o d + (o + d) m + 4 m^2): a copy of the matrix that solvers destroy, singular vectors and those
        that are kept, and the work space of LAPACK's gesdd."""
        smaller = min(self.num_rows, self.num_columns)
        return FP32 * (2 * self.numel + (self.num_rows + self.num_columns) * smaller + 4 * smaller**2)

    def product_bytes(self, element_bytes: int) -> int:
        """Of a projection: two matrices in float32, the codes of a side twice, and copies from and to 16 bits."""
        codes = max(self.num_rows * self.right_rank, self.num_columns * self.left_rank)
        copies = 0 if element_bytes == FP32 else (FP32 + element_bytes) * self.numel
        return 2 * FP32 * (self.numel + codes) + copies


def subspaces_memory(size: ModelSize, sharding: Sharding, unfreeze_rank_ratio: float) -> MemoryUse:
    """Memory and disk space of frozen subspaces. Of the rank that has most:

    | what | where | bytes |
    |---|---|---|
    | subspaces | device | `num_bytes` of each matrix that it projects: all at ZeRO 0, else its share |
    | in a step | device | one product, or one exchange of cut matrices; updates of cut matrices until then |
    | old values | with the optimizer's state | those of the largest matrix that it has all of, 16 MiB at least |
    | start of a domain | device | `decomposition_bytes` of the largest matrix |
    | checkpoint within a domain | disk, copied in host memory | the subspaces of all matrices |

    Args:
        size: of the network, with its hidden matrices.
        sharding: of the optimizer.
        unfreeze_rank_ratio: fraction of the directions that is not frozen.
    """
    planned = _plan_all(size, unfreeze_rank_ratio)
    loads = plan_matrix_loads(size, sharding)
    return MemoryUse(
        device={"frozen subspaces": max(sum(p.num_bytes for p in _projected(load, planned)) for load in loads)},
        device_in_step={"products of masks": max(_scratch_bytes(load, planned, sharding) for load in loads)},
        optimizer={
            "old values of a chunk": max(FP32 * _largest_chunk(load, planned, size, sharding) for load in loads)
        },
        device_at_start={"decomposition of one matrix": max(p.decomposition_bytes for p in planned.values())},
        checkpoint=sum(p.num_bytes for p in planned.values()),
    )


def subspaces_step_use(size: ModelSize, sharding: Sharding, unfreeze_rank_ratio: float) -> StepUse:
    """Of the projection of all gradients and of all updates; at stage 0 by every rank.

    Exchanges are those of matrices that shards cut: of all ranks that which sends most is counted.

    Args:
        size, sharding, unfreeze_rank_ratio: see `subspaces_memory`.
    """
    flops = sum(p.flops for p in _plan_all(size, unfreeze_rank_ratio).values())
    sent = max(load.sent for load in plan_matrix_loads(size, sharding))
    num_bytes = (gradient_element_bytes(sharding) + FP32) * sent
    return StepUse(
        flops=2 * flops * (sharding.num_ranks if sharding.stage == 0 else 1),
        collectives=(Collective("all_to_all", "cut matrices of masks", num_bytes),) if sent else (),
    )


def _plan_all(size: ModelSize, unfreeze_rank_ratio: float) -> dict[str, PlannedSubspaces]:
    """Matrix -> its sizes."""
    return {matrix.input: PlannedSubspaces.plan(matrix, unfreeze_rank_ratio) for matrix in size.matrices}


def plan_matrix_loads(size: ModelSize, sharding: Sharding) -> tuple[RankLoad, ...]:
    """The load of every rank, where a matrix is one vector."""
    vectors = tuple(replace(matrix, num_outputs=1, width=matrix.numel) for matrix in size.matrices)
    return plan_loads(replace(size, matrices=vectors), sharding)


def _complete(load: RankLoad, planned: dict[str, PlannedSubspaces]) -> Iterable[PlannedSubspaces]:
    """The matrices that a rank has all of."""
    return (planned[name] for name, numel in load.stepped.items() if numel == planned[name].numel)


def _projected(load: RankLoad, planned: dict[str, PlannedSubspaces]) -> Iterable[PlannedSubspaces]:
    """The matrices that a rank projects: those that it has all of, and cut ones that it completes."""
    yield from _complete(load, planned)
    yield from (planned[name] for name in load.owned)


def _largest_chunk(load: RankLoad, planned: dict[str, PlannedSubspaces], size: ModelSize, sharding: Sharding) -> int:
    """Elements that are stepped at once: a matrix is not divided."""
    # Without ZeRO every parameter is a flat tensor of its own, and others than these are not masked.
    largest = max(size.parameters[matrix.parameter][0] for matrix in size.matrices)
    numel = largest if sharding.stage == 0 else -(-size.trained // sharding.num_ranks)
    fragments = (min(count, planned[name].numel) for name, count in load.stepped.items())
    return max(min(numel, MAX_CHUNK_ELEMENTS), max(fragments, default=0))


def _scratch_bytes(load: RankLoad, planned: dict[str, PlannedSubspaces], sharding: Sharding) -> int:
    """The most that exists for a while in a pass over gradients, or in one over updates, which come on top."""
    completed = max((planned[name].numel for name in load.owned), default=0)
    # A round has at least one matrix, whatever its size.
    in_round = (min(n, max(MAX_ROUND_ELEMENTS, completed)) for n in (load.fragments, load.completed))
    exchanged = 2 * sum(in_round)
    most = 0
    for element_bytes, kept, update in ((gradient_element_bytes(sharding), 0, 0), (FP32, load.fragments, 1)):
        # The update of a complete matrix is there with its product.
        complete = max(
            (p.product_bytes(element_bytes) + FP32 * update * p.numel for p in _complete(load, planned)), default=0
        )
        cut = max((planned[name].product_bytes(element_bytes) for name in load.owned), default=0)
        exchange = element_bytes * exchanged + cut if load.fragments else 0
        most = max(most, FP32 * kept + max(complete, exchange))
    return most
