"""Plasticity of direction masks: the directions that are open, and the share of an input's energy that passes.

Each input is measured by one rank, its owner, which steps a matrix of it and so has its projector anyway. No moment
is formed, and what ranks exchange are three numbers for each input.

Shape legend: d width of an input, n vectors, N inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from das_ds.context import RunContext
from das_ds.data.batch import Batch
from das_ds.distributed.collectives import all_reduce_sum
from das_ds.distributed.resumable import ResumableLoop
from das_ds.errors import TrainingError
from das_ds.functional.directions import passing_energy, plasticity
from das_ds.functional.projectors import Projector
from das_ds.models.size import FP32
from das_ds.softmask.input_layout import InputLayout
from das_ds.softmask.linear_inputs import record_inputs
from das_ds.softmask.measure import PRETRAINING
from das_ds.softmask.plasticity import InputPlasticity

ENERGIES = "energies"
BLOCK_BYTES = 64 << 20
"""Of vectors that are projected at once, in float32."""


def everything_open(inputs: InputLayout) -> dict[str, InputPlasticity]:
    """Input -> what is left where nothing is masked, P = I."""
    return {name: InputPlasticity(width, 1.0, 1.0) for name, width in inputs.widths.items()}


def measure_plasticity(
    run: RunContext,
    inputs: InputLayout,
    projectors: Mapping[str, Projector],
    batches: ResumableLoop[Batch] | None,
) -> dict[str, InputPlasticity]:
    """tr(P) / d and E|x P|^2 / E|x|^2 of every input x, by a forward pass over a sample; a collective.

    With the weights of `record_inputs` and without dropout, as moments are measured. A run that resumes within the
    sample continues with its sums.

    Args:
        run: the engine and its network.
        inputs: layout of the inputs.
        projectors: input -> P on this rank's device, of all inputs that it owns and steps a matrix of; others are
            ignored.
        batches: the complete sample, the same batches on every rank; None: only tr(P) / d.

    Raises:
        TrainingError: an input that is not finite, on every rank.
    """
    # An owner steps most of the elements of an input's matrices, so it is one of the ranks that have its projector.
    own = {name: projectors[name] for name in inputs.owned_by(run.engine.ranks.info.rank) if name in projectors}
    rows = torch.zeros(len(inputs.widths), 3, dtype=torch.float64, device=run.engine.ranks.info.device)
    if batches is not None:
        rows[:, 1:] = _sum_energies(run, inputs, own, batches)
    numbers = _numbers(inputs)
    for name, projector in own.items():
        rows[numbers[name], 0] = plasticity(projector)
    return _combine(inputs, rows)


def measure_protected(
    run: RunContext,
    inputs: InputLayout,
    projectors: Iterable[tuple[str, Projector]],
    moments: Mapping[str, torch.Tensor],
) -> dict[str, InputPlasticity]:
    """tr(P) / d and tr(P A P) / tr(A) of every input, whose second moment A is known; a collective.

    Args:
        run: the engine.
        inputs: layout of the inputs.
        projectors: (input, P) on this rank's device, one at a time; those of inputs that it does not own are ignored.
        moments: input -> A, (d, d) float32 in host memory, of the inputs that this rank owns.
    """
    device = run.engine.ranks.info.device
    rows = torch.zeros(len(inputs.widths), 3, dtype=torch.float64, device=device)
    numbers = _numbers(inputs)
    for name, projector in projectors:
        if name in moments:
            energy = float(moments[name].diagonal().double().sum())
            passing = passing_energy(projector, moments[name].to(device)) * energy
            rows[numbers[name]] = torch.tensor([plasticity(projector), energy, passing], dtype=torch.float64)
    return _combine(inputs, rows)


def _numbers(inputs: InputLayout) -> dict[str, int]:
    return {name: number for number, name in enumerate(inputs.widths)}


def _sum_energies(
    run: RunContext, inputs: InputLayout, projectors: Mapping[str, Projector], batches: ResumableLoop[Batch]
) -> torch.Tensor:
    """(N, 2) float64: sums of w |x|^2 and w |x P|^2 of the inputs that this rank measures, 0 of the others."""
    sums = batches.accumulators
    device = run.engine.ranks.info.device
    if ENERGIES not in sums:
        sums[ENERGIES] = torch.zeros(len(inputs.widths), 2, dtype=torch.float64, device=device)
    numbers = _numbers(inputs)

    # Tables are equal in all batches: the first is enough.
    def add(name: str, x: torch.Tensor, weights: torch.Tensor | None, is_table: bool) -> None:
        if not is_table or batches.num_done == 0:
            add_energies_(sums[ENERGIES][numbers[name]], projectors[name], x, weights)

    # Every rank runs the network, which ZeRO 3 gathers from all of them.
    with PRETRAINING.mode(run), torch.no_grad(), record_inputs(run, projectors, add) as recorder:
        for batch in batches:
            batch = batch.to(device)
            recorder.start(batch)
            run.engine.module(batch.corrupted_ids, batch.predicted, batch.targets, batch.position_ids)
    return sums[ENERGIES]


def add_energies_(total: torch.Tensor, projector: Projector, x: torch.Tensor, weights: torch.Tensor | None) -> None:
    """total <- total + (sum_n w_n |x_n|^2, sum_n w_n |x_n P|^2), by blocks of vectors, without waiting for the device.

    Args:
        total: (2,) float64.
        projector: P.
        x: (n, d), of any float type.
        weights: (n,), not negative; None: all 1.
    """
    block = max(1, BLOCK_BYTES // (FP32 * projector.width))
    for start in range(0, len(x), block):
        rows = x[start : start + block].float()
        for column, vectors in enumerate((rows, projector.project(rows))):
            energies = vectors.square().sum(dim=1, dtype=torch.float64)
            total[column] += (energies if weights is None else energies * weights[start : start + block]).sum()


def _combine(inputs: InputLayout, rows: torch.Tensor) -> dict[str, InputPlasticity]:
    """The rows that each rank measured: plasticity, energy, energy that passes."""
    found = all_reduce_sum(rows).cpu()
    result = {}
    for (name, width), (share, energy, passing) in zip(inputs.widths.items(), found.tolist(), strict=True):
        if not all(map(math.isfinite, (share, energy, passing))):
            raise TrainingError(
                f"plasticity: found an input of {name} that is not finite, expected finite numbers; the model "
                "diverged, or its activations leave the range of train.precision (bf16 and fp32 have a larger one)"
            )
        result[name] = InputPlasticity(width, share, passing / energy if energy > 0.0 else None)
    return result
