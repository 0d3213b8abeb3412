"""AdamW whose whole step is scaled by 1 - I, over one flat shard."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim.adamw import adamw

from das_ds.functional.masks import Piece


def masked_adamw_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    pieces: Sequence[Piece],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """theta <- theta + (1 - I) * Delta, Delta being AdamW's step with decoupled decay (Loshchilov & Hutter, alg. 2).

    The moments see the unmasked gradient, so a unit that is released later moves at once at its proper rate.

    Args:
        param, grad, exp_avg, exp_avg_sq: (F,) float32, one flat shard, updated in place (grad is only read).
        step: float32 scalar tensor, the number of steps taken before this one; the caller counts.
        pieces: rectangles that cover the shard; see `functional.masks`.
    """
    for piece in pieces:
        window = slice(piece.start, piece.stop)
        part = param[window]
        old = part.clone() if piece.is_masked else None
        adamw(
            [part],
            [grad[window]],
            [exp_avg[window]],
            [exp_avg_sq[window]],
            [],
            [step.clone()],
            fused=True,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )
        if old is not None:
            piece.pull_back_(part, old)
