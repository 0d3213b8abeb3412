"""Memory of masks of directions, from the widths of a network's inputs."""

from __future__ import annotations

from collections.abc import Mapping

from das_ds.models.size import FP32, MemoryUse, Sharding
from das_ds.softmask.input_layout import moment_bytes
from das_ds.softmask.input_moments import SUMS_BYTES

PROJECTOR_BYTES = 40
"""Of an entry of a moment while its dense projector is computed: the moment in float32; in float64 M / c, the identity,
I + M / c and two factors. Workspaces of the solver come on top; the projector itself is counted as held."""


def directions_memory(widths: Mapping[int, int], num_trained: int, sharding: Sharding) -> MemoryUse:
    """Memory and disk space of moments and dense projectors: S bytes for all inputs, 4 d^2 for each; R ranks.

    | what | where | bytes |
    |---|---|---|
    | moments | host memory of their owners | S / R |
    | projectors | with the optimizer's state | S; at stages 1 and 2 about S / R, and one that two ranks share |
    | weights before the step | with the optimizer's state | 4 P, from stage 1 on 4 P / R |
    | start of a domain | device | `PROJECTOR_BYTES` d^2 of the widest input, whose projector is computed |
    | end of a domain | device | sums of one group of inputs; where inputs have 16 bits, one moment more |
    | end of a domain | host | the moments of the domain, S / R, and one sum with earlier ones |
    | checkpoint | disk | 2 S and, while a group is measured, its sums on every rank |
    | files | disk | S for each domain, and S |

    Moments in checkpoints are written from where they are. Projectors of the next domain are computed at the end of a
    domain, when the sums and the old ones are gone, and are kept: that takes what the start of a domain takes.

    Args:
        widths: d -> number of inputs of that width.
        num_trained: P.
        sharding: of the optimizer over R ranks.
    """
    moments = sum(count * moment_bytes(width) for width, count in widths.items())
    widest = max(widths)
    largest = moment_bytes(widest)
    own_moments = -(-moments // sharding.num_ranks)
    is_divided_by_layers = sharding.stage in (1, 2)
    held = min(moments, own_moments + largest) if is_divided_by_layers else moments
    sums = max(largest, min(moments, SUMS_BYTES))
    product = largest if sharding.weight_bytes < FP32 else 0
    return MemoryUse(
        optimizer={
            "direction masks": held,
            "weights before the step": FP32 * num_trained // sharding.optimizer_shards,
        },
        host={"moments of inputs": own_moments},
        device_at_start={"projector of one input": PROJECTOR_BYTES * widest**2},
        device_at_end={"sums of inputs": sums + product},
        host_at_end={"moments of one domain": own_moments + largest},
        measurement="forward",
        checkpoint=2 * moments + sharding.num_ranks * sums,
        checkpoint_in_place=2 * moments,
        # In the checkpoint at its end and in a file; the sum over all domains in a file.
        domain=2 * moments,
        run=moments,
    )
