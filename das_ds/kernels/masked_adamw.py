"""Masked AdamW: the complete step is scaled by 1 - I, over one flat fp32 shard.

Shape legend: F elements of a flat tensor.
"""

from __future__ import annotations

import torch

from das_ds.kernels.adamw_step import AdamWStep
from das_ds.kernels.dispatch import check_flat, use_triton
from das_ds.kernels.native import protection_arguments, run, use_native
from das_ds.kernels.protection import Protection


def masked_adamw_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    protection: Protection,
    *,
    num_steps: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: torch.Tensor | None = None,
) -> None:
    """theta <- theta + (1 - I) * Delta, Delta being AdamW's step; the formula is `functional.adamw.masked_adamw_`.

    Weights of importance 1 keep their value to the last bit. Nothing is read back from the device.

    Args:
        param, exp_avg, exp_avg_sq: (F,) float32, updated in place.
        grad: (F,) float32; undefined afterwards where `grad_scale` is given.
        protection: importance of the F elements.
        num_steps: steps taken, this one included.
        lr, betas, eps, weight_decay: AdamW's settings.
        grad_scale: float32 scalar on the same device that gradients are divided by; None: 1.

    Raises:
        ValueError: tensors of another shape, type, device or layout.
    """
    tensors = {"param": param, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    check_flat(tensors, protection.numel)
    form = masked_adamw_torch_
    if use_triton("masked_adamw", param):
        from das_ds.kernels.masked_adamw_triton import masked_adamw_triton_

        form = masked_adamw_triton_
    elif use_native(param):
        form = masked_adamw_native_
    form(AdamWStep(param, grad, exp_avg, exp_avg_sq, num_steps, lr, betas, eps, weight_decay, grad_scale), protection)


def masked_adamw_native_(step: AdamWStep, protection: Protection) -> None:
    """Masked AdamW in C++, in one pass."""
    scale = 1.0 if step.grad_scale is None else 1.0 / float(step.grad_scale)
    pointers = (*(tensor.data_ptr() for tensor in step.tensors), *protection_arguments(protection))
    run("masked_adamw", 0, step.param.numel(), pointers, (scale, *step.hyperparameters))


def masked_adamw_torch_(step: AdamWStep, protection: Protection) -> None:
    """Masked AdamW in torch, fused and tile by tile, so that a step is masked while its output is in the cache."""
    num_steps = torch.tensor(float(step.num_steps), device=step.param.device)
    # Allocated once: fresh pages for every tile would cost more than the work on them.
    old = protection.scratch()
    scratch = protection.scratch()
    for tile in protection.cpu_tiles:
        values, grad, exp_avg, exp_avg_sq = (tensor[tile.start : tile.stop] for tensor in step.tensors)
        is_protected = protection.protects(tile)
        if is_protected:
            old[: len(tile)].copy_(values)
        # Not torch.optim's function: its checks take as long as this step on thousands of elements.
        torch._fused_adamw_(
            [values],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [],
            [num_steps],
            lr=step.lr,
            beta1=step.betas[0],
            beta2=step.betas[1],
            weight_decay=step.weight_decay,
            eps=step.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=step.grad_scale,
            found_inf=None,
        )
        if is_protected:
            protection.lerp_toward_(values, old[: len(tile)], tile, scratch)
