"""Arguments of one AdamW step over a flat tensor, shared by all forms of `masked_adamw_`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class AdamWStep(NamedTuple):
    """Tensors and settings; (F,) float32 each, as described at `kernels.masked_adamw.masked_adamw_`."""

    param: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    num_steps: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    grad_scale: torch.Tensor | None

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """In the order in which kernels take them."""
        return self.param, self.grad, self.exp_avg, self.exp_avg_sq

    @property
    def hyperparameters(self) -> tuple[float, ...]:
        """Scalars of the kernels: lr / (1 - b1^t), 1 / sqrt(1 - b2^t), 1 - b1, 1 - b2, eps, lr * weight_decay."""
        beta1, beta2 = self.betas
        # On the host, in double precision: in single precision 1 - 0.999 ** t would lose most of its digits.
        correction1 = 1.0 - beta1**self.num_steps
        correction2 = 1.0 - beta2**self.num_steps
        return (
            self.lr / correction1,
            1.0 / math.sqrt(correction2),
            1.0 - beta1,
            1.0 - beta2,
            self.eps,
            self.lr * self.weight_decay,
        )
