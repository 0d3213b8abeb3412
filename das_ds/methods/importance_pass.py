"""Measuring unit importance: one forward and backward pass per batch, gradients of the gates only.

Shape legend: B sequences of a batch, L layers, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from das_ds.data.batches import Batch
from das_ds.distributed.collectives import all_reduce_sum
from das_ds.functional.importance import absolute_sum
from das_ds.functional.losses import representation_kl, sequence_token_loss
from das_ds.functional.units import Importance
from das_ds.methods.base import RunContext

GatedLoss = Callable[[RunContext, Batch, Importance], torch.Tensor]
"""(run, batch, gates: group -> (L, B, U)) -> (B,) loss of each sequence."""


def pretraining_loss(run: RunContext, batch: Batch, gates: Importance) -> torch.Tensor:
    """Importance of a domain (paper eq. 2): each sequence's own pre-training loss, without dropout."""
    run.engine.module.eval()
    with run.gates.active(gates):
        _, logits = run.engine.module(batch.corrupted_ids, batch.predicted)
    rows = batch.predicted // batch.input_ids.shape[1]
    return sequence_token_loss(logits, batch.targets, rows, len(batch.input_ids))


def general_knowledge_loss(run: RunContext, batch: Batch, gates: Importance) -> torch.Tensor:
    """Importance of general knowledge (paper section 3.1): KL between two dropout views of the same input.

    Both views pass through the same gates, so a gate's gradient is that of both.
    """
    run.engine.module.train()
    both = {group: torch.cat((gate, gate), dim=1) for group, gate in gates.items()}
    no_positions = batch.predicted[:0]
    with run.gates.active(both):
        hidden, _ = run.engine.module(batch.input_ids.repeat(2, 1), no_positions)
    return representation_kl(*hidden.chunk(2))


def mean_absolute_gate_gradient(run: RunContext, batches: Iterable[Batch], loss: GatedLoss) -> Importance:
    """I_l = (1/N) sum_n |dL(x_n) / dg_l| over the sequences of all ranks (paper eq. 2), before normalisation.

    Args:
        run: the engine, its gates and unit counts.
        batches: this rank's batches; every rank has the same number of them.
        loss: what is differentiated.

    Returns:
        Group -> (L, U) float32, equal on every rank.
    """
    device = run.engine.ranks.info.device
    sums = run.layout.zeros(device)
    num_sequences = torch.zeros((), device=device)
    for batch in batches:
        batch = batch.to(device)
        gates = {
            group: torch.ones(run.layout.num_layers, len(batch.input_ids), units, device=device, requires_grad=True)
            for group, units in run.layout.num_units.items()
        }
        gradients = torch.autograd.grad(loss(run, batch, gates).sum(), list(gates.values()))
        run.engine.release_gathered_weights()
        for group, gradient in zip(gates, gradients, strict=True):
            for layer, layer_gradient in enumerate(gradient):
                sums[group][layer] += absolute_sum(layer_gradient, batch.row_weights)
        num_sequences += batch.row_weights.sum()
    run.engine.module.train()
    all_reduce_sum(num_sequences)
    return {group: all_reduce_sum(total) / num_sequences for group, total in sums.items()}
