"""Linear cross-entropy: loss of the logits of one linear map, a chunk of positions at a time.

Shape legend: P positions, H inputs of the map, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from das_ds.kernels.dispatch import use_liger

Weigh = Callable[[torch.Tensor], torch.Tensor]
"""Logits (n, V) of some positions -> their weights (n,), which are constants of the loss and leave the logits as they
are."""


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    chunk: int,
    soft_cap: float | None = None,
    weigh: Weigh | None = None,
) -> torch.Tensor:
    """l_p = log sum_v e^{z_pv} - z_{p, y_p} with z = hidden W^T + b, or c tanh(z / c) where logits are capped at c.

    With `weigh`, w_p l_p instead, w_p = weigh(z_p) without a gradient.

    At most one chunk of logits exists at a time, in the forward pass and in the backward pass, which recomputes them.
    The softmax and the sums of the gradients over chunks are in float32 whatever the type of the inputs.

    Args:
        hidden: (P, H) float.
        weight, bias: (V, H) and (V,) of the type of `hidden`.
        targets: (P,) int64, each in [0, V).
        chunk: positions per chunk of the torch form; Liger's kernel chooses its own, about P H / V.
        soft_cap: c.
        weigh: weights of positions; Liger's kernel shows no logits, so that the torch form runs.

    Returns:
        (P,) float32 (float64 for inputs of that type).
    """
    if weigh is None and len(hidden) and use_liger("linear_cross_entropy", hidden):
        return linear_cross_entropy_liger(hidden, weight, bias, targets, soft_cap)
    return LinearCrossEntropy.apply(hidden, weight, bias, targets, chunk, soft_cap, weigh)


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
        weigh: Weigh | None = None,
    ) -> torch.Tensor:
        """Arguments as for `linear_cross_entropy`."""
        norms = hidden.new_empty(len(hidden), dtype=accumulation_type(hidden))
        losses = torch.empty_like(norms)
        weights = None if weigh is None else torch.empty_like(norms)
        for chunk_rows in chunks(len(hidden), chunk):
            # (chunk, V) in float32: the only logits that exist.
            logits = capped_logits(hidden[chunk_rows], weight, bias, soft_cap)
            torch.logsumexp(logits, dim=1, out=norms[chunk_rows])
            losses[chunk_rows] = norms[chunk_rows] - logits.gather(1, targets[chunk_rows, None]).squeeze(1)
            if weigh is not None and weights is not None:
                weights[chunk_rows] = weigh(logits)
            del logits
        if weights is not None:
            losses *= weights
        # ZeRO-3 frees the weights after the forward pass. Saved as parameters, they are gathered when they are read.
        ctx.save_for_backward(hidden, weight, bias, targets, norms, weights)
        ctx.chunk = chunk
        ctx.soft_cap = soft_cap
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """dz_pv = w_p upstream_p (softmax(z_p)_v - [v = y_p]), times 1 - tanh^2 where logits are capped."""
        hidden, weight, bias, targets, norms, weights = ctx.saved_tensors
        upstream = upstream if weights is None else upstream * weights

        def subtract_targets(probabilities: torch.Tensor, chunk_rows: slice) -> None:
            rows = torch.arange(len(probabilities), device=targets.device)
            probabilities[rows, targets[chunk_rows]] -= 1.0

        gradients = linear_gradients(
            (hidden, weight, bias), ctx.needs_input_grad[:3], norms, upstream, subtract_targets, ctx.chunk, ctx.soft_cap
        )
        return *gradients, None, None, None, None


def accumulation_type(hidden: torch.Tensor) -> torch.dtype:
    """Type of losses and of sums: float32, or float64 for inputs of that type."""
    return torch.promote_types(hidden.dtype, torch.float32)


def chunks(num_positions: int, chunk: int) -> Iterator[slice]:
    """Slices of at most `chunk` positions."""
    return (slice(first, first + chunk) for first in range(0, num_positions, chunk))


def capped_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, soft_cap: float | None
) -> torch.Tensor:
    """z, or c tanh(z / c): (n, H), (V, H), (V,) -> (n, V) of `accumulation_type`."""
    logits = functional.linear(hidden, weight, bias).to(accumulation_type(hidden))
    return logits if soft_cap is None else logits.div_(soft_cap).tanh_().mul_(soft_cap)


def linear_gradients(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    wanted: Sequence[bool],
    norms: torch.Tensor,
    upstream: torch.Tensor,
    subtract_targets: Callable[[torch.Tensor, slice], None],
    chunk: int,
    soft_cap: float | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of a loss with dz_pv = upstream_p (softmax(z_p)_v - t_pv), times 1 - tanh^2 where logits are capped.

    Args:
        inputs: hidden (P, H), weight (V, H) and bias (V,).
        wanted: which of them need a gradient.
        norms: (P,) log of each position's sum of exponentials.
        upstream: (P,).
        subtract_targets: subtracts t from the softmax (n, V) of the positions of a slice, in place.
        chunk: positions whose logits exist at a time.
        soft_cap: c.
    """
    hidden, weight, bias = inputs
    grad_hidden = torch.empty_like(hidden) if wanted[0] else None
    grad_weight = torch.zeros_like(weight, dtype=norms.dtype) if wanted[1] else None
    grad_bias = torch.zeros_like(bias, dtype=norms.dtype) if bias is not None and wanted[2] else None
    for chunk_rows in chunks(len(hidden), chunk):
        # In place: one chunk of logits exists, and a second one where the slope of the cap is needed.
        logits = capped_logits(hidden[chunk_rows], weight, bias, soft_cap)
        slope = None if soft_cap is None else (logits / soft_cap).square_().neg_().add_(1.0)
        # softmax(z) = exp(z - log sum exp z)
        grad_logits = logits.sub_(norms[chunk_rows, None]).exp_()
        subtract_targets(grad_logits, chunk_rows)
        grad_logits *= upstream[chunk_rows, None]
        if slope is not None:
            grad_logits *= slope
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
        del logits, slope, grad_logits
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
    )
