"""The contrastive loss across ranks, with its gradients."""

from __future__ import annotations

import torch

from das_ds.distributed.collectives import all_gather_with_grad, rank, world_size
from das_ds.distributed.process_group import init_process_group
from das_ds.functional.losses import contrastive_loss


def loss_and_gradients(views: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Global loss and the gradient of the global loss by this rank's rows of `views` (3, N, H): full, full+, prev."""
    init_process_group()
    size = views.shape[1] // world_size()
    mine = views[:, rank() * size : (rank() + 1) * size].clone().requires_grad_()
    full, positive, previous = mine
    loss = contrastive_loss(
        full,
        all_gather_with_grad(positive),
        all_gather_with_grad(previous),
        first_positive=rank() * size,
        temperature=0.05,
    )
    # DeepSpeed averages gradients over ranks; here every rank's share is kept apart.
    (gradient,) = torch.autograd.grad(loss / world_size(), mine)
    return loss.item(), gradient
