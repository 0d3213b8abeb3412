"""Memory of masks of directions, from the matrices of a network and ZeRO's arithmetic.

Shape legend: d width of an input, r rank of a projector, n elements of a product, P trained parameters, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from das_ds.functional.directions import Rank, is_dense, projector_work_bytes
from das_ds.models.size import FP32, MemoryUse, ModelSize, Sharding
from das_ds.softmask.fragments import MAX_ROUND_ELEMENTS
from das_ds.softmask.input_layout import assign_owners, group_inputs, moment_bytes
from das_ds.softmask.input_moments import PRODUCT_BYTES, SUMS_BYTES
from das_ds.softmask.planned_shards import RankLoad, plan_loads
from das_ds.softmask.projection import num_vectors_at_once
from das_ds.softmask.update_chunks import MAX_CHUNK_ELEMENTS

if TYPE_CHECKING:
    from das_ds.softmask.apply import DirectionTarget

BF16 = 2
"""Bytes of an element of a basis where training is in 16 bits."""


@dataclass(frozen=True)
class DirectionForm:
    """What is known of masks before a run."""

    rank: Rank
    """With `auto`, whose ranks depend on what is measured, sizes are those of `full`, the largest that can be."""
    apply_to: DirectionTarget
    decays: bool
    """Whether weights decay."""

    def passes(self, sharding: Sharding) -> Iterator[tuple[int, bool]]:
        """(bytes of an element, whether updates are masked) of each pass over all vectors in a step: gradients,
        updates, or weights that decay where only gradients are masked."""
        if self.apply_to != "update":
            yield gradient_element_bytes(sharding), False
        if self.apply_to != "gradient":
            yield FP32, True
        elif self.decays:
            yield FP32, False


@dataclass(frozen=True)
class PlannedProjector:
    """Sizes of a projector, which need not exist; see `functional.projectors.Projector`."""

    width: int
    code_width: int
    num_bytes: int

    @classmethod
    def plan(cls, width: int, rank: Rank, weight_bytes: int) -> PlannedProjector:
        """The projector of an input: 4 d^2, or 4 d r in fp32 and 2 d r in 16 bits, and 4 r."""
        if rank == "auto" or is_dense(rank, width):
            return cls(width, width, FP32 * width**2)
        assert isinstance(rank, int)
        return cls(width, rank, (FP32 if weight_bytes == FP32 else BF16) * width * rank + FP32 * rank)

    @property
    def is_dense(self) -> bool:
        """Whether the code of a vector is the vector."""
        return self.code_width == self.width


def gradient_element_bytes(sharding: Sharding) -> int:
    """Of a gradient when it is masked: as it is accumulated, at stage 0 as it is computed; in fp32 under offload."""
    if sharding.offloads_optimizer:
        return FP32
    return sharding.weight_bytes if sharding.stage == 0 else sharding.gradient_bytes


def directions_memory(size: ModelSize, sharding: Sharding, form: DirectionForm) -> MemoryUse:
    """Memory and disk space of moments and projectors: S = sum of 4 d^2 over all inputs. Of the rank that has most:

    | what | where | bytes |
    |---|---|---|
    | moments | host memory of their owners | about S / W, at least that of the widest input where it owns one |
    | projectors | device | of the inputs that it steps a matrix of: at stages 1 and 2 some, at 0 and 3 all |
    | in a step | device | `scratch_bytes` |
    | old values, where updates are masked | with the optimizer's state | 16 MiB at most |
    | start of a domain | device | `projector_work_bytes` of the widest input, in place of its projector |
    | end of a domain | device | sums of one group of inputs; where inputs have 16 bits, a block of a product |
    | end of a domain | host | moments of the domain, and sums with earlier ones beside a checkpoint of those |
    | checkpoint | disk | 2 S and, while a group is measured, its sums from every rank |
    | files | disk | S for each domain, and S |

    Not counted are fp32 copies of what is frozen beside the masks, biases and normalization above all: in BERT-base 0.5
    % of the weights, in an 8 B decoder 0.003 %, sharded as the optimizer is.

    Moments in checkpoints are written from where they are, so a checkpoint that is still being written keeps earlier
    sums. Those of the domain are kept until it is known what its masks let through.

    Projectors of the next domain are computed at the end of a domain, when the sums and the old ones are gone, and are
    kept through export and evaluation: that takes what the start of a domain takes. Before the first domain general
    text is measured with the memory of the end of a domain; what is probed before any takes less, blocks of 64 MiB in
    place of the sums.

    Args:
        size: of the network, with its matrices.
        sharding: of the optimizer.
        form: of the masks.
    """
    widths = {matrix.input: matrix.width for matrix in size.matrices}
    projectors = {name: PlannedProjector.plan(d, form.rank, sharding.weight_bytes) for name, d in widths.items()}
    loads = plan_loads(size, sharding)
    moments = sum(map(moment_bytes, widths.values()))
    # At stage 3 the first rank has no less of anything than others.
    busiest = loads[:1] if sharding.stage == 3 else loads
    masks_updates = form.apply_to != "gradient"
    # Without ZeRO every parameter is a flat tensor of its own.
    numel = max(n for n, _ in size.parameters) if sharding.stage == 0 else -(-size.trained // sharding.num_ranks)
    return moments_memory(size, sharding) + MemoryUse(
        device={"direction masks": max(sum(projectors[name].num_bytes for name in load.stepped) for load in busiest)},
        device_in_step={"products of masks": max(scratch_bytes(load, projectors, sharding, form) for load in busiest)},
        # The optimizer keeps their memory from step to step.
        optimizer={"old values of a chunk": FP32 * min(numel, MAX_CHUNK_ELEMENTS)} if masks_updates else {},
        device_at_start={
            "projector of one input": max(
                projector_work_bytes(projector.width) - projector.num_bytes for projector in projectors.values()
            )
        },
        # The files: of the domain, and of the sum over all domains.
        domain=moments,
        run=moments,
    )


def moments_memory(size: ModelSize, sharding: Sharding) -> MemoryUse:
    """The part of `directions_memory` that measuring moments and keeping their sum takes, without files.

    Args:
        size: of the network, with its matrices.
        sharding: of the optimizer.
    """
    widths = {matrix.input: matrix.width for matrix in size.matrices}
    moments = sum(map(moment_bytes, widths.values()))
    largest = moment_bytes(max(widths.values()))
    sums = max(sum(moment_bytes(widths[name]) for name in group) for group in group_inputs(widths, SUMS_BYTES))
    product = min(largest, PRODUCT_BYTES) if sharding.weight_bytes < FP32 else 0
    own_moments = _most_owned(widths, plan_loads(size, sharding), sharding.num_ranks)
    return MemoryUse(
        host={"moments of inputs": own_moments},
        device_at_end={"sums of inputs": sums + product},
        host_at_end={"moments of one domain": own_moments, "sums over domains": own_moments},
        measurement="forward",
        checkpoint=2 * moments,
        checkpoint_of_rank=sums,
        checkpoint_in_place=2 * moments,
        # In the checkpoint at its end.
        domain=moments,
    )


def _most_owned(widths: Mapping[str, int], loads: Sequence[RankLoad], num_ranks: int) -> int:
    """Bytes of moments of the rank that owns most."""
    stepped: list[Mapping[str, int]] = [load.stepped for load in loads]
    owners = assign_owners(widths, stepped if len(stepped) == num_ranks else stepped * num_ranks)
    owned = [0] * num_ranks
    for name, owner in owners.items():
        owned[owner] += moment_bytes(widths[name])
    return max(owned)


def scratch_bytes(
    load: RankLoad, projectors: Mapping[str, PlannedProjector], sharding: Sharding, form: DirectionForm
) -> int:
    """What exists for a while in a step: the largest product, or the largest exchange of cut vectors.

    A mask of updates has the update of a product in addition, and the updates of cut vectors until the last chunk.

    Args:
        load: of the rank.
        projectors: input -> its sizes.
        sharding: of the optimizer.
        form: of the masks.
    """
    most = 0
    for element_bytes, is_update in form.passes(sharding):
        products = [
            _product_bytes(projectors[name], elements, load.num_matrices[name] > 1, element_bytes, sharding, is_update)
            for name, elements in load.stepped.items()
        ]
        exchange = element_bytes * 2 * sum(min(n, MAX_ROUND_ELEMENTS) for n in (load.fragments, load.completed))
        if is_update:
            kept = FP32 * load.fragments
            most = max(most, kept + max([exchange, *products]))
        else:
            most = max(most, exchange, *products)
    return most


def _product_bytes(
    projector: PlannedProjector,
    numel: int,
    is_stacked: bool,
    element_bytes: int,
    sharding: Sharding,
    is_update: bool,
) -> int:
    """Of one product of n elements: their copy in one place, the product in float32, and it in the vectors' own type.

    A dense projector multiplies a copy of 16-bit vectors in float32. One of low rank has the codes twice, and on its
    way to float32 vectors a copy of a 16-bit basis. Of a mask of updates come the updates themselves.
    """
    limit = MAX_CHUNK_ELEMENTS if is_update else num_vectors_at_once(projector.width) * projector.width
    n = min(numel, limit)
    copies = element_bytes * n * (is_stacked + is_update)
    is_short = element_bytes != FP32
    if projector.is_dense:
        return copies + FP32 * n + (FP32 * n if is_short else 0)
    codes = 2 * FP32 * (n // projector.width) * projector.code_width
    basis = FP32 * projector.width * projector.code_width if sharding.weight_bytes != FP32 and not is_short else 0
    return copies + FP32 * n + codes + max(basis, element_bytes * n if is_short else 0)
