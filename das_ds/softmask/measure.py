"""Importance measurement: the losses that are differentiated, and the pass over a sample for units.

Shape legend: B sequences of a batch, S positions, L layers, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from das_ds.config import ImportanceScore
from das_ds.data.batch import Batch
from das_ds.distributed.collectives import all_reduce_max, all_reduce_sum
from das_ds.distributed.resumable import ResumableLoop
from das_ds.errors import TrainingError
from das_ds.functional.importance import importance_score
from das_ds.functional.losses import representation_kl, sequence_token_loss
from das_ds.functional.units import UnitLayout, UnitValues

if TYPE_CHECKING:
    from das_ds.context import RunContext
    from das_ds.models.gates import UnitGates

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
"""(input ids, predicted positions, targets, position ids) -> (hidden states, losses): an engine or its module."""


@dataclass(frozen=True)
class ImportanceLoss:
    """A loss whose gradient gives importance."""

    of_sequences: Callable[[Forward, Batch], torch.Tensor]
    """(forward, batch) -> (B,) loss of each sequence."""
    dropout: bool
    """Whether the network runs with dropout."""
    num_views: int
    """Rows of the forward pass for each sequence."""

    @contextmanager
    def mode(self, run: RunContext) -> Iterator[None]:
        """Inside, the network runs with or without dropout; afterwards with it, as in training."""
        run.engine.module.train(self.dropout)
        try:
            yield
        finally:
            run.engine.module.train()

    @contextmanager
    def views(self, run: RunContext, batch: Batch) -> Iterator[None]:
        """Inside, a network without dropout has noise at its units; the backward pass runs inside too."""
        probability = run.view_dropout if self.dropout else 0.0
        with run.gates.noise(probability, num_rows=self.num_views * len(batch.input_ids)):
            yield


def pretraining_loss(forward: Forward, batch: Batch) -> torch.Tensor:
    """Importance of a domain (paper eq. 2): each sequence's own pre-training loss."""
    _, losses = forward(batch.corrupted_ids, batch.predicted, batch.targets, batch.position_ids)
    rows = batch.predicted // batch.input_ids.shape[1]
    return sequence_token_loss(losses, rows, len(batch.input_ids))


def general_knowledge_loss(forward: Forward, batch: Batch) -> torch.Tensor:
    """Importance of general knowledge (paper section 3.1): KL between two dropout views of the same input.

    Both views pass through the same gates, so a gate's gradient is that of both.
    """
    positions = duplicate_rows(batch.position_ids, 2)
    hidden, no_losses = forward(batch.input_ids.repeat(2, 1), batch.predicted[:0], batch.targets[:0], positions)
    # No position is predicted, but the LM head has to be part of the graph: ZeRO waits for every gradient.
    return representation_kl(*hidden.chunk(2)) + no_losses.sum()


def duplicate_rows(position_ids: torch.Tensor | None, times: int) -> torch.Tensor | None:
    """(times * B, S) position ids of a packed batch."""
    return None if position_ids is None else position_ids.repeat(times, 1)


TOTALS = "totals"
SCALE = "loss_scale"
NEGLIGIBLE_LOSS = 1e-10
"""In nats; far below any loss that differs from 0 by more than rounding."""

PRETRAINING = ImportanceLoss(pretraining_loss, dropout=False, num_views=1)
GENERAL_KNOWLEDGE = ImportanceLoss(general_knowledge_loss, dropout=True, num_views=2)


def measure_unit_importance(
    run: RunContext, batches: ResumableLoop[Batch], loss: ImportanceLoss, kind: ImportanceScore
) -> UnitValues:
    """I_l = (1/N) sum_n s(dL(x_n) / dg_l) over the sequences of all ranks, before normalization.

    with s = `importance_score`; for `abs_grad` it is paper eq. 2, the mean absolute gradient of the gates.

    In fp16 the loss of a batch is scaled, and a batch whose gradients are not finite is measured again at half the
    scale, down to 1.

    Args:
        run: the engine, its gates and unit counts.
        batches: this rank's batches, all with the same number of rows; every rank has the same number of them.
        loss: the loss to differentiate.
        kind: which score is averaged.

    Returns:
        Group -> (L, U) float32, equal on every rank.

    Raises:
        TrainingError: a gradient that is not finite.
    """
    device = run.engine.ranks.info.device
    sums = batches.accumulators
    # Number of sequences and the sum of their losses.
    sums.setdefault(TOTALS, torch.zeros(2, dtype=torch.float64, device=device))
    sums.setdefault(SCALE, torch.tensor(run.engine.loss_scale, dtype=torch.float64))
    with loss.mode(run):
        for batch in batches:
            batch = batch.to(device)
            # The scale is kept among the sums, so that a resumed pass continues with it.
            scale = float(sums[SCALE])
            scaled, losses = _scaled_gradients(run, batch, loss, scale)
            # In fp16 a batch that leaves the range of the type is measured again before it enters the sums.
            while scale > 1.0 and not all_finite(scaled):
                scale = max(scale / 2.0, 1.0)
                scaled, losses = _scaled_gradients(run, batch, loss, scale)
            for group, values in scaled.items():
                # (L, B, U), one score per sequence of a batch.
                sums[group] = importance_score(values / scale, 1.0, kind) + sums.get(group, 0.0)
            sums[TOTALS] = sums[TOTALS] + count_and_sum(batch, losses)
            sums[SCALE] = torch.tensor(scale, dtype=torch.float64)
    by_group = {group: sums[group] for group in run.layout.num_units}
    # Summed over ranks in place; the loop's own sums stay this rank's.
    return average_scores(by_group, sums[TOTALS].clone())


def average_scores(sums: UnitValues, totals: torch.Tensor) -> UnitValues:
    """Mean score over the sequences of all ranks, group -> (L, U) float32, equal on every rank; a collective.

    Args:
        sums: group -> (L, B, U) float32, sums of scores on this rank.
        totals: (2,) float64, its number of sequences and the sum of their losses; changed.

    Raises:
        TrainingError: a gradient that is not finite, on any rank.
    """
    if not all_finite(sums):
        raise TrainingError(
            "importance: found a gradient of a gate that is not finite, expected finite numbers; the model diverged, "
            "or its activations leave the range of train.precision (bf16 and fp32 have a larger one)"
        )
    per_sequence = is_above_noise_floor(totals) / totals[0].float()
    # (L, B, U) -> (L, U) over all sequences of all ranks.
    return {group: all_reduce_sum(total.sum(dim=1)) * per_sequence for group, total in sums.items()}


def count_and_sum(batch: Batch, losses: torch.Tensor) -> torch.Tensor:
    """(2,): number of real sequences of a batch and the sum of their losses (B,)."""
    return torch.stack((batch.row_weights, batch.row_weights * losses.detach())).sum(dim=1)


def is_above_noise_floor(totals: torch.Tensor) -> torch.Tensor:
    """1, or 0 where the mean loss of all ranks is so small that its gradient is only rounding; a collective.

    Two views of a network without noise are equal: their KL is 0, and the rounding errors of its gradient would be
    amplified by the normalization, which ignores scale.

    Args:
        totals: (2,) float64, number of sequences and sum of their losses; summed over ranks in place.
    """
    count, loss = all_reduce_sum(totals)
    return (loss / count > NEGLIGIBLE_LOSS).float()


def _scaled_gradients(
    run: RunContext, batch: Batch, loss: ImportanceLoss, scale: float
) -> tuple[UnitValues, torch.Tensor]:
    """scale * |dL(x_n) / dg| of one batch, group -> (L, B, U) float32, and the losses (B,)."""
    with loss.views(run, batch):
        result = gate_gradients(
            run.gates,
            run.layout,
            batch.row_weights,
            lambda: loss.of_sequences(run.engine.module, batch),
            num_views=loss.num_views,
            scale=scale,
        )
    run.engine.weights.release_gathered()
    return result


def gate_gradients(
    gates: UnitGates,
    layout: UnitLayout,
    row_weights: torch.Tensor,
    of_sequences: Callable[[], torch.Tensor],
    *,
    num_views: int = 1,
    scale: float = 1.0,
) -> tuple[UnitValues, torch.Tensor]:
    """scale * w_n |dL(x_n) / dg| of every gate g, group -> (L, B, U) float32, and the losses (B,).

    Args:
        gates: of the network.
        layout: its units.
        row_weights: (B,) float32, w.
        of_sequences: runs the network; gives the loss of each sequence, (B,).
        num_views: rows of the forward pass for each sequence.
        scale: factor of the loss.
    """
    sums = {
        group: torch.zeros(layout.num_layers, len(row_weights), num_units, device=row_weights.device)
        for group, num_units in layout.num_units.items()
    }
    with gates.measuring(sums, row_weights, num_views) as anchor:
        losses = of_sequences()
        # Every gate adds to `sums` in its backward pass; no gradient of a weight is computed.
        torch.autograd.grad(losses.sum() * scale, anchor)
    return sums, losses.detach()


def all_finite(sums: Mapping[str, torch.Tensor]) -> bool:
    """Whether all entries on all ranks are finite; a collective that waits for the device."""
    is_bad = torch.stack([values.isfinite().all().logical_not() for values in sums.values()]).any()
    return not all_reduce_max(is_bad.float()).item()
