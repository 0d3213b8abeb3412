"""Merging of an engine's weights with those from before a domain, by the second moments of what its matrices read.

Shape legend: d width of an input, n elements of its matrices that a rank steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from das_ds.context import RunContext
from das_ds.distributed.state import Flats, Shard
from das_ds.engine.zero import full_shape
from das_ds.functional.projectors import ExactMap
from das_ds.functional.regression_mean import merging_map, merging_work_bytes
from das_ds.models.size import FP32, MemoryUse, ModelSize, Sharding
from das_ds.softmask.direction import DirectionImportance
from das_ds.softmask.direction_mask import build_direction_mask
from das_ds.softmask.direction_memory import moments_memory
from das_ds.softmask.linear_inputs import find_masked_matrices
from das_ds.softmask.masked_matrix import MaskedMatrix
from das_ds.softmask.matrix_blocks import find_held_elements
from das_ds.softmask.planned_shards import plan_loads
from das_ds.softmask.projection import MAX_PRODUCT_ELEMENTS
from das_ds.softmask.projector_exchange import find_room


def merge_by_moments(
    run: RunContext,
    before: Flats,
    earlier: DirectionImportance,
    latest: DirectionImportance,
    *,
    num_earlier: int,
    off_diagonal: float,
) -> None:
    """W <- (W_old M + W A) (M + A)^-1 for every matrix, theta <- (k theta_old + theta) / (k + 1) for all else.

    A collective. Owners of moments compute one map R at a time, see `merging_map`, and send it to the ranks that step a
    matrix of the input; each of these adds (W_old - W) R to its shards, and ranks that share a row complete it on one
    of them. Rows of tokens that are not in M stay as they were learned, and so do their biases and embeddings.

    Args:
        run: the engine and its network.
        before: fp32 weights W_old of this rank's flat tensors, on any device.
        earlier: M.
        latest: A.
        num_earlier: k, how many moments M is the sum of.
        off_diagonal: see `merging_map`.
    """
    device = run.engine.ranks.info.device
    by_input: dict[str, list[MaskedMatrix]] = {}
    for matrix in find_masked_matrices(run, earlier.num_tokens):
        by_input.setdefault(matrix.input, []).append(matrix)

    def compute(name: str, moment: torch.Tensor) -> ExactMap:
        where = find_room(device, merging_work_bytes(len(moment)))
        return merging_map(moment, latest.moments[name], off_diagonal, where)

    maps = (compute(name, moment) for name, moment in earlier.moments.items())
    with run.engine.weights.writable_flats():
        for name, shared in earlier.share(maps):
            _merge_matrices(run, before, by_input[name], shared)
        _average_others(run, before, by_input, earlier.num_tokens, num_earlier / (num_earlier + 1))


def _merge_matrices(run: RunContext, before: Flats, matrices: list[MaskedMatrix], shared: ExactMap | None) -> None:
    """W <- W + (W_old - W) R for the matrices of one input; a collective."""
    device = run.engine.ranks.info.device
    held = list(_held_parts(run.engine.weights.shards, matrices))
    distances = [before[part.flat][part.span].to(device) - part.values.to(device) for part in held]
    maps = {} if shared is None else {matrices[0].input: shared}
    build_direction_mask(held, matrices, maps, device).apply_(distances)
    for part, distance in zip(held, distances, strict=True):
        part.values.add_(distance.to(part.values.device))


def _held_parts(shards: Sequence[Shard], matrices: Sequence[MaskedMatrix]) -> Iterator[Shard]:
    """The parts of these shards that lie in a matrix."""
    for held in find_held_elements(shards, matrices):
        shard = shards[held.shard]
        first = matrices[held.matrix].start + held.begin
        flat_start = shard.flat_start + first - shard.param_start
        yield replace(shard, flat_start=flat_start, param_start=first, numel=held.end - held.begin)


def _average_others(
    run: RunContext, before: Flats, by_input: dict[str, list[MaskedMatrix]], num_tokens: int | None, weight: float
) -> None:
    """theta <- theta + weight (theta_old - theta) for this rank's shards of parameters without a matrix."""
    merged = {matrix.parameter for matrices in by_input.values() for matrix in matrices}
    for shard in run.engine.weights.shards:
        if shard.name in merged:
            continue
        values = shard.values
        old = before[shard.flat][shard.span]
        if shard.name in run.layout.vocabulary and num_tokens is not None:
            shape = full_shape(run.engine.parameters[shard.name])
            num_known = max(num_tokens * math.prod(shape[1:]) - shard.param_start, 0)
            values = values[:num_known]
            old = old[:num_known]
        values.lerp_(old.to(values.device), weight)


def merge_memory(size: ModelSize, sharding: Sharding) -> MemoryUse:
    """Moments as masks of directions have them, without files, and between two domains the merge of one input:

    40 d^2 bytes while R is computed, 4 n of (W_old - W), and blocks of it in float64, where the sums of inputs were.

    Args:
        size: of the network, with its matrices.
        sharding: of the optimizer.
    """
    widths = {matrix.input: matrix.width for matrix in size.matrices}
    largest = max(
        merging_work_bytes(widths[name]) + FP32 * n + 2 * 8 * min(n, MAX_PRODUCT_ELEMENTS)
        for load in plan_loads(size, sharding)
        for name, n in load.stepped.items()
    )
    moments = moments_memory(size, sharding)
    beyond = max(largest - sum(moments.device_at_end.values()), 0)
    return moments + MemoryUse(device_at_end={"merge of one input": beyond})
