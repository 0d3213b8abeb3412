"""Linear cross-entropy: loss of the logits of one linear map, a chunk of positions at a time.

Shape legend: P positions, H inputs of the map, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from das_ds.kernels.dispatch import use_liger


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    chunk: int,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """l_p = log sum_v e^{z_pv} - z_{p, y_p} with z = hidden W^T + b, or c tanh(z / c) where logits are capped at c.

    At most one chunk of logits exists at a time, in the forward pass and in the backward pass, which recomputes them.
    The softmax and the sums of the gradients over chunks are in float32 whatever the type of the inputs.

    Args:
        hidden: (P, H) float.
        weight, bias: (V, H) and (V,) of the type of `hidden`.
        targets: (P,) int64, each in [0, V).
        chunk: positions per chunk of the torch form; Liger's kernel chooses its own, about P H / V.
        soft_cap: c.

    Returns:
        (P,) float32 (float64 for inputs of that type).
    """
    if use_liger("linear_cross_entropy", hidden):
        return linear_cross_entropy_liger(hidden, weight, bias, targets, soft_cap)
    return LinearCrossEntropy.apply(hidden, weight, bias, targets, chunk, soft_cap)


def linear_cross_entropy_liger(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    soft_cap: float | None,
) -> torch.Tensor:
    """Cross-entropy by Liger's fused kernel, whose weights have to stay gathered until the end of the backward pass."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="none", softcap=soft_cap, accum_dtype=torch.float32)
    losses: torch.Tensor = fused(weight, hidden, targets, bias)
    return losses


class LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy` in torch; keeps the log of each position's sum of exponentials for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        chunk: int,
        soft_cap: float | None,
    ) -> torch.Tensor:
        """Arguments as for `linear_cross_entropy`."""
        norms = hidden.new_empty(len(hidden), dtype=_accumulation_type(hidden))
        losses = torch.empty_like(norms)
        for chunk_rows in _chunks(len(hidden), chunk):
            # (chunk, V) in float32: the only logits that exist.
            logits = _logits(hidden[chunk_rows], weight, bias)
            if soft_cap is not None:
                logits.div_(soft_cap).tanh_().mul_(soft_cap)
            torch.logsumexp(logits, dim=1, out=norms[chunk_rows])
            losses[chunk_rows] = norms[chunk_rows] - logits.gather(1, targets[chunk_rows, None]).squeeze(1)
            del logits
        # ZeRO-3 frees the weights after the forward pass. Saved as parameters, they are gathered when they are read.
        ctx.save_for_backward(hidden, weight, bias, targets, norms)
        ctx.chunk = chunk
        ctx.soft_cap = soft_cap
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """dz_pv = upstream_p (softmax(z_p)_v - [v = y_p]), times 1 - tanh^2 where logits are capped."""
        hidden, weight, bias, targets, norms = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=norms.dtype) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=norms.dtype) if wants_bias else None
        for chunk_rows in _chunks(len(hidden), ctx.chunk):
            grad_logits = _logits_gradient(
                _logits(hidden[chunk_rows], weight, bias),
                targets[chunk_rows],
                norms[chunk_rows],
                upstream[chunk_rows],
                ctx.soft_cap,
            )
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0)
            # The products run in the type of the weights, as those of an ordinary linear map do.
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[chunk_rows])
            if grad_weight is not None and grad_weight.dtype == hidden.dtype:
                grad_weight.addmm_(grad_logits.T, hidden[chunk_rows])
            elif grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[chunk_rows]
            del grad_logits
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _accumulation_type(hidden: torch.Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _chunks(num_positions: int, chunk: int) -> Iterator[slice]:
    return (slice(first, first + chunk) for first in range(0, num_positions, chunk))


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return functional.linear(hidden, weight, bias).to(_accumulation_type(hidden))


def _logits_gradient(
    logits: torch.Tensor, targets: torch.Tensor, norms: torch.Tensor, upstream: torch.Tensor, soft_cap: float | None
) -> torch.Tensor:
    # In place: one chunk of logits exists, and a second one where the slope of the cap is needed.
    slope = None
    if soft_cap is not None:
        tanh = logits.div_(soft_cap).tanh_()
        slope = tanh.square().neg_().add_(1.0)
        logits = tanh.mul_(soft_cap)
    # softmax(z) = exp(z - log sum exp z)
    gradient = logits.sub_(norms[:, None]).exp_()
    rows = torch.arange(len(targets), device=targets.device)
    gradient[rows, targets] -= 1.0
    gradient *= upstream[:, None]
    return gradient if slope is None else gradient.mul_(slope)
