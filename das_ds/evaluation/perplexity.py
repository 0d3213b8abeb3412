"""Held-out loss per predicted token with fixed corruption: repeated evaluation gives the same number."""

from __future__ import annotations

import torch
from torch import nn

from das_ds.data.batches import Batch
from das_ds.distributed.collectives import all_reduce_sum
from das_ds.distributed.passes import Pass
from das_ds.errors import DataError

TOTAL = "total"


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: Pass[Batch], device: torch.device) -> float:
    """Mean cross-entropy over the predicted tokens of all ranks, in nats; perplexity is its exponential.

    Args:
        model: `LanguageModel`; left in the mode it was in.
        batches: this rank's batches; every rank has the same number of them.
        device: where the model is.

    Raises:
        DataError: nothing is predicted on any rank.
    """
    was_training = model.training
    model.eval()
    total = batches.sums.setdefault(TOTAL, torch.zeros(2, dtype=torch.float64, device=device))
    for batch in batches:
        batch = batch.to(device)
        _, losses = model(batch.corrupted_ids, batch.predicted, batch.targets, batch.position_ids)
        total[0] += losses.sum()
        total[1] += batch.num_predicted
    model.train(was_training)
    loss_sum, count = all_reduce_sum(total.clone()).tolist()
    if count == 0:
        raise DataError(
            "found no predicted token in the held-out text, expected some: a loss of nothing says nothing "
            "(data.mlm_probability, evaluation.max_sequences)"
        )
    return float(loss_sum / count)
