"""Measuring importance: what is differentiated, and the pass over a sample that gives the importance of units.

Shape legend: B sequences of a batch, S positions, L layers, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from das_ds.data.batches import Batch
from das_ds.distributed.collectives import all_reduce_maximum, all_reduce_sum
from das_ds.errors import TrainingError
from das_ds.functional.losses import representation_kl, sequence_token_loss
from das_ds.functional.units import Importance
from das_ds.methods.base import RunContext

Forward = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(input ids, predicted positions) -> (hidden states, logits): an engine or the module in it."""


@dataclass(frozen=True)
class ImportanceLoss:
    """A loss whose gradient tells importance."""

    of_sequences: Callable[[Forward, Batch], torch.Tensor]
    """(forward, batch) -> (B,) loss of each sequence."""
    dropout: bool
    """Whether the network runs with dropout."""
    num_views: int
    """Rows that pass the network for each sequence."""


def pretraining_loss(forward: Forward, batch: Batch) -> torch.Tensor:
    """Importance of a domain (paper eq. 2): each sequence's own pre-training loss."""
    _, logits = forward(batch.corrupted_ids, batch.predicted)
    rows = batch.predicted // batch.input_ids.shape[1]
    return sequence_token_loss(logits, batch.targets, rows, len(batch.input_ids))


def general_knowledge_loss(forward: Forward, batch: Batch) -> torch.Tensor:
    """Importance of general knowledge (paper section 3.1): KL between two dropout views of the same input.

    Both views pass through the same gates, so a gate's gradient is that of both.
    """
    no_positions = batch.predicted[:0]
    hidden, logits = forward(batch.input_ids.repeat(2, 1), no_positions)
    # No logits, but every weight takes part: ZeRO waits for the gradients of all.
    return representation_kl(*hidden.chunk(2)) + logits.sum()


PRETRAINING = ImportanceLoss(pretraining_loss, dropout=False, num_views=1)
GENERAL_KNOWLEDGE = ImportanceLoss(general_knowledge_loss, dropout=True, num_views=2)


def mean_absolute_gate_gradient(run: RunContext, batches: Iterable[Batch], loss: ImportanceLoss) -> Importance:
    """I_l = (1/N) sum_n |dL(x_n) / dg_l| over the sequences of all ranks (paper eq. 2), before normalisation.

    In fp16 the loss of a batch is scaled, and a batch whose gradients are not finite is measured again at half the
    scale, down to 1.

    Args:
        run: the engine, its gates and unit counts.
        batches: this rank's batches, of equally many rows; every rank has the same number of them.
        loss: what is differentiated.

    Returns:
        Group -> (L, U) float32, equal on every rank.

    Raises:
        TrainingError: a gradient that is not finite.
    """
    device = run.engine.ranks.info.device
    sums: Importance = {}
    num_sequences = torch.zeros((), device=device)
    scale = run.engine.loss_scale
    run.engine.module.train(loss.dropout)
    for batch in batches:
        batch = batch.to(device)
        part = _scaled_sums(run, batch, loss, scale)
        # In fp16 a batch that leaves the range of the type is measured again before it enters the sums.
        while scale > 1.0 and not _all_finite(part):
            scale = max(scale / 2.0, 1.0)
            part = _scaled_sums(run, batch, loss, scale)
        sums = {group: values / scale + sums.get(group, 0.0) for group, values in part.items()}
        num_sequences += batch.row_weights.sum()
    run.engine.module.train()
    if not _all_finite(sums):
        raise TrainingError(
            "importance: found a gradient of a gate that is not finite, expected finite numbers; the model diverged, "
            "or its activations leave the range of train.precision (bf16 and fp32 have a larger one)"
        )
    all_reduce_sum(num_sequences)
    return {group: all_reduce_sum(total.sum(dim=1)) / num_sequences for group, total in sums.items()}


def _scaled_sums(run: RunContext, batch: Batch, loss: ImportanceLoss, scale: float) -> Importance:
    """scale * |dL(x_n) / dg| of one batch, group -> (L, B, U) float32."""
    shape = (run.layout.num_layers, len(batch.input_ids))
    units = run.layout.num_units.items()
    sums = {group: torch.zeros(*shape, size, device=batch.input_ids.device) for group, size in units}
    with run.gates.measuring(sums, batch.row_weights, loss.num_views) as anchor:
        torch.autograd.grad(loss.of_sequences(run.engine.module, batch).sum() * scale, anchor)
    run.engine.release_gathered_weights()
    return sums


def _all_finite(sums: Importance) -> bool:
    """Whether all entries on all ranks are finite; a collective that waits for the device."""
    is_bad = torch.stack([values.isfinite().all().logical_not() for values in sums.values()]).any()
    return not all_reduce_maximum(is_bad.float()).item()
