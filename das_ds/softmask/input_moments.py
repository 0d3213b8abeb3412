"""Moments of inputs: uncentered second moments of what masked matrices read, over a sample of text.

Shape legend: n vectors, d width of an input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch

from das_ds.data.batch import Batch
from das_ds.distributed.collectives import rank, reduce_sum
from das_ds.distributed.process_group import ProcessGroup
from das_ds.distributed.resumable import ResumableLoop
from das_ds.errors import TrainingError
from das_ds.models.size import FP32
from das_ds.softmask.input_layout import InputLayout, group_inputs
from das_ds.softmask.linear_inputs import record_inputs
from das_ds.softmask.measure import PRETRAINING

if TYPE_CHECKING:
    from das_ds.context import RunContext

SUMS_BYTES = 2 << 30
"""Of the sums that a rank has on its device at a time, 4 d^2 bytes for each input, or those of the widest input. It
does not depend on the number of ranks, so a run that resumes on others has the same groups; with 8 billion weights
sharded over 64 ranks it is less than what is free between steps, and the sample is read 16 times."""
PRODUCT_BYTES = 64 << 20
"""Of a product of 16-bit inputs, before it is added to a sum: as many rows of the sum as fit, at least one."""
TOKENS_PER_WIDTH = 20
"""Tokens of a sample for each element of the widest input: the error of a moment of n Gaussian vectors is about
sqrt(d / n) of its largest eigenvalue (Vershynin, High-Dimensional Probability, 2018, theorem 4.7.1), here a fifth."""
MIN_SEQUENCES = 512
"""Of a sample: tokens of one sequence resemble each other."""


def default_num_samples(widest: int, sequence_length: int) -> int:
    """Sequences of a sample whose size nobody chose: 20 tokens per element of the widest input, 512 at least.

    Args:
        widest: the largest d.
        sequence_length: tokens of a sequence.
    """
    return max(MIN_SEQUENCES, math.ceil(TOKENS_PER_WIDTH * widest / sequence_length))


def measure_moments(
    run: RunContext,
    layout: InputLayout,
    start_loop: Callable[[str], ResumableLoop[Batch]],
    label: str,
    measured: dict[str, torch.Tensor | None],
) -> None:
    """M = A / (tr(A) / d), A = E[x x^T], of every input x that is not measured yet; a collective.

    The expectation is over all positions of the sample that reach a layer, on all ranks, without dropout, of the text
    as training corrupts it, with the weights of `record_inputs`; the LM head sees predicted positions only. A table
    that a layer reads in every forward pass, such as that of relative positions, counts once, however many passes the
    sample needs.

    The sample is read once for each group of inputs whose sums fit into `SUMS_BYTES`; see `group_inputs`. The sums of
    all ranks are then reduced to the owner of each input, one matrix at a time, so that a rank's device never has more
    than one group's sums, and its host memory only the moments that it owns. A run that resumes within a group
    continues with its sums.

    Args:
        run: the engine and its network.
        layout: of the inputs.
        start_loop: label -> a loop over this rank's batches; every rank has the same number of them.
        label: of the loops.
        measured: input -> its moment, (d, d) float32 in host memory on the owner, None elsewhere; what a group gives is
            added when it is complete, with the same names on every rank.

    Raises:
        TrainingError: an input that is not finite, on any rank.
    """
    groups = group_inputs(layout.widths, SUMS_BYTES)
    for number, group in enumerate(groups):
        if all(name in measured for name in group):
            continue
        loop = start_loop(label if len(groups) == 1 else f"{label}, part {number + 1} of {len(groups)}")
        _sum_over_sample(run, layout, loop, group)
        measured |= reduce_to_owners(run.engine.ranks, layout, loop.accumulators, group)
        # The owners have them: neither the device nor a checkpoint of the next group needs the sums.
        loop.accumulators.clear()


def _sum_over_sample(run: RunContext, layout: InputLayout, batches: ResumableLoop[Batch], group: Sequence[str]) -> None:
    """Add up x x^T of a group's inputs in the accumulators of the loop."""
    sums = batches.accumulators
    device = run.engine.ranks.info.device
    for name in group:
        if name not in sums:
            sums[name] = torch.zeros(layout.widths[name], layout.widths[name], device=device)

    # Tables are equal in all batches and on all ranks: the first batch of rank 0 is enough.
    def add(name: str, x: torch.Tensor, weights: torch.Tensor | None, is_table: bool) -> None:
        if not is_table or (batches.num_done == 0 and rank() == 0):
            add_second_moment_(sums[name], x, weights)

    with PRETRAINING.mode(run), torch.no_grad(), record_inputs(run, group, add) as recorder:
        for batch in batches:
            batch = batch.to(device)
            recorder.start(batch)
            run.engine.module(batch.corrupted_ids, batch.predicted, batch.targets, batch.position_ids)


def add_second_moment_(total: torch.Tensor, x: torch.Tensor, weights: torch.Tensor | None) -> None:
    """total <- total + sum_n w_n x_n x_n^T, accumulated in float32.

    On a GPU 16-bit inputs are multiplied as they are (with weights: rounded again), ten times as fast as in float32;
    products of two 16-bit numbers are exact in float32. Their product is a float32 matrix of its own before
    it is added, so it is made by blocks of rows, of `PRODUCT_BYTES` each. Elsewhere the inputs are cast to float32.

    Args:
        total: (d, d) float32.
        x: (n, d), of any float type.
        weights: (n,), not negative; None: all 1.
    """
    is_mixed = multiplies_16_bits(x)
    rows = x if is_mixed else x.float()
    if weights is not None:
        # Both factors get the root, so that the sum stays symmetric where they are rounded. Never a float32 copy.
        rows = torch.mul(rows, weights.sqrt()[:, None], out=torch.empty_like(rows))
    if is_mixed:
        block = max(1, PRODUCT_BYTES // (FP32 * len(total)))
        for start, part in zip(range(0, len(total), block), total.split(block), strict=True):
            part += torch.mm(rows[:, start : start + block].T, rows, out_dtype=torch.float32)
    else:
        total.addmm_(rows.T, rows)


def multiplies_16_bits(x: torch.Tensor) -> bool:
    """Whether products of x are made of its 16 bits: on a GPU, by a torch that sums them in float32."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and has_mixed_products()


@cache
def has_mixed_products() -> bool:
    """Whether this torch multiplies 16-bit matrices into a float32 one, on a GPU."""
    return "dtype" in torch.ops.aten.mm.overloads()


def reduce_to_owners(
    ranks: ProcessGroup, layout: InputLayout, sums: dict[str, torch.Tensor], group: Sequence[str]
) -> dict[str, torch.Tensor | None]:
    """Input -> M in host memory on its owner, None elsewhere; a collective.

    Args:
        ranks: the process group.
        layout: of the inputs.
        sums: input -> (d, d) float32 sum of x x^T on this rank; used up.
        group: the inputs, in the same order on every rank.

    Raises:
        TrainingError: on every rank, where an input was not finite on any.
    """
    moments: dict[str, torch.Tensor | None] = {}
    failure: TrainingError | None = None
    for name in group:
        total = reduce_sum(sums.pop(name), layout.owners[name])
        if rank() != layout.owners[name]:
            moments[name] = None
            continue
        if not normalize_moment_(total):
            failure = failure or TrainingError(
                f"importance: found an input of {name} that is not finite, expected finite numbers; the model "
                "diverged, or its activations leave the range of train.precision (bf16 and fp32 have a larger one)"
            )
        moments[name] = total.cpu()
    ranks.raise_on_all_ranks(failure)
    return moments


def normalize_moment_(total: torch.Tensor) -> bool:
    """total <- total / (tr(total) / d), in place; 0 stays 0. The number of vectors that were summed cancels.

    A mean below the normal numbers of float32 counts as 0: it has no digits left, and its inverse would be infinite.

    Args:
        total: (d, d) float32, a sum of x x^T.

    Returns:
        Whether all x were finite. The diagonal tells: no entry of a sum of squares is larger in size.
    """
    mean = total.diagonal().double().mean()
    is_negligible = mean < torch.finfo(torch.float32).tiny
    total.mul_(torch.where(is_negligible, 0.0, 1.0 / mean).float())
    return bool(mean.isfinite())
