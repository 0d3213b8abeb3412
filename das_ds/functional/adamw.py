"""Reference formulas of masked AdamW, whose complete step is scaled by 1 - I; the fast forms are in `kernels`.

Shape legend: F elements.
"""

from __future__ import annotations

import torch


def masked_adamw_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    importance: torch.Tensor,
    *,
    num_steps: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
) -> None:
    """theta <- theta + (1 - I) * Delta, Delta being AdamW's step with decoupled decay (Loshchilov & Hutter, alg. 2).

        m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2          g = grad / grad_scale
        Delta = -lr * (weight_decay * theta + (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps))

    The moments see the unmasked gradient, so a unit that is released later moves at its proper rate at once.

    Args:
        param, grad, exp_avg, exp_avg_sq: (F,) of one floating dtype; all but grad change in place.
        importance: (F,) I in [0, 1].
        num_steps: t, this step included.
        lr, betas, eps, weight_decay: AdamW's settings.
        grad_scale: divisor of the gradient (DeepSpeed's loss scale times its clipping factor).
    """
    beta1, beta2 = betas
    unscaled = grad / grad_scale
    exp_avg.mul_(beta1).add_(unscaled, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(unscaled, unscaled, value=1 - beta2)
    direction = exp_avg / (1 - beta1**num_steps) / ((exp_avg_sq / (1 - beta2**num_steps)).sqrt() + eps)
    param.sub_(lr * (1 - importance) * (weight_decay * param + direction))


def soft_update_(param: torch.Tensor, old: torch.Tensor, importance: torch.Tensor) -> None:
    """p <- p + (p_old - p) * I: the step of any optimizer is undone in proportion to the importance; all (F,)."""
    param.add_((old - param) * importance)
