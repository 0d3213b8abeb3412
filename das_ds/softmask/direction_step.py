"""Operations and exchanges of masks of directions in a step, from the matrices of a network and ZeRO's arithmetic."""

from __future__ import annotations

from das_ds.models.size import Collective, ModelSize, Sharding, StepUse
from das_ds.softmask.direction_memory import DirectionForm, PlannedProjector
from das_ds.softmask.planned_shards import plan_loads


def directions_step_use(size: ModelSize, sharding: Sharding, form: DirectionForm) -> StepUse:
    """Of all passes over the vectors of masked matrices: 2 o d^2 operations for a matrix, or 4 o d r of low rank.

    At stage 0 every rank multiplies all vectors. Exchanges are those of cut vectors: a fragment of m elements travels
    to the rank that completes its vector, and so does the product's fragment back. Of all ranks that which sends most
    is counted.

    Args:
        size: of the network, with its matrices.
        sharding: of the optimizer.
        form: of the masks.
    """
    flops = 0
    for matrix in size.matrices:
        projector = PlannedProjector.plan(matrix.width, form.rank, sharding.weight_bytes)
        flops += matrix.numel * (2 * matrix.width if projector.is_dense else 4 * projector.code_width)
    passes = [element_bytes for element_bytes, _ in form.passes(sharding)]
    sent = max(load.sent for load in plan_loads(size, sharding))
    return StepUse(
        flops=flops * len(passes) * (sharding.num_ranks if sharding.stage == 0 else 1),
        collectives=(Collective("all_to_all", "cut vectors of masks", sum(passes) * sent),) if sent else (),
    )
