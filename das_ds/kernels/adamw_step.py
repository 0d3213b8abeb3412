"""One step of AdamW over a flat tensor, as the forms of `masked_adamw_` take it."""

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
    def numbers(self) -> tuple[float, ...]:
        """What kernels compute with: lr / (1 - b1^t), 1 / sqrt(1 - b2^t), 1 - b1, 1 - b2, eps, lr * weight_decay."""
        beta1, beta2 = self.betas
        # In double precision here: 1 - 0.999 ** t has few digits in single.
        correction1, correction2 = 1.0 - beta1**self.num_steps, 1.0 - beta2**self.num_steps
        return (
            self.lr / correction1,
            1.0 / math.sqrt(correction2),
            1.0 - beta1,
            1.0 - beta2,
            self.eps,
            self.lr * self.weight_decay,
        )
