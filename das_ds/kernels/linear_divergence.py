"""Linear divergence: how far the logits of one linear map are from a teacher's, a chunk of positions at a time.

Shape legend: P positions, H inputs of the map, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from das_ds.kernels.linear_cross_entropy import accumulation_type, capped_logits, chunks, linear_gradients


@dataclass(frozen=True)
class LinearLogits:
    """Logits hidden W^T + b that do not exist yet."""

    hidden: torch.Tensor
    """(P, H) float."""
    weight: torch.Tensor
    """(V, H)."""
    bias: torch.Tensor | None
    """(V,)."""


def linear_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    teacher: LinearLogits,
    *,
    chunk: int,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """KL(softmax(z*_p) || softmax(z_p)) of every position (`functional.losses.softmax_kl`), z = hidden W^T + b.

    z* are the teacher's logits, which have no gradient; both are c tanh(z / c) where logits are capped at c. Logits
    of both exist for half a chunk of positions at a time, in the forward pass and in the backward pass, which
    recomputes them. Softmax and sums over chunks are in float32 whatever the type of the inputs.

    Args:
        hidden: (P, H) float.
        weight, bias: (V, H) and (V,) of the type of `hidden`.
        teacher: of the same positions and tokens.
        chunk: positions whose logits of one kind may exist.
        soft_cap: c.

    Returns:
        (P,) float32 (float64 for inputs of that type).
    """
    return _LinearDivergence.apply(
        hidden, weight, bias, teacher.hidden, teacher.weight, teacher.bias, max(1, chunk // 2), soft_cap
    )


class _LinearDivergence(torch.autograd.Function):
    """`linear_divergence`; keeps the log of each position's sums of exponentials for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        teacher_hidden: torch.Tensor,
        teacher_weight: torch.Tensor,
        teacher_bias: torch.Tensor | None,
        chunk: int,
        soft_cap: float | None,
    ) -> torch.Tensor:
        """sum_v p_v (z*_v - z_v) - ln sum_v e^{z*_v} + ln sum_v e^{z_v}, p = softmax(z*)."""
        norms = hidden.new_empty(len(hidden), dtype=accumulation_type(hidden))
        teacher_norms = torch.empty_like(norms)
        divergences = torch.empty_like(norms)
        for chunk_rows in chunks(len(hidden), chunk):
            logits = capped_logits(hidden[chunk_rows], weight, bias, soft_cap)
            teacher_logits = capped_logits(teacher_hidden[chunk_rows], teacher_weight, teacher_bias, soft_cap)
            torch.logsumexp(logits, dim=1, out=norms[chunk_rows])
            torch.logsumexp(teacher_logits, dim=1, out=teacher_norms[chunk_rows])
            # In place: log p - log q, then p.
            differences = logits.neg_().add_(teacher_logits)
            differences += (norms[chunk_rows] - teacher_norms[chunk_rows])[:, None]
            probabilities = teacher_logits.sub_(teacher_norms[chunk_rows, None]).exp_()
            divergences[chunk_rows] = differences.mul_(probabilities).sum(dim=1)
            del logits, teacher_logits, differences, probabilities
        ctx.save_for_backward(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, norms, teacher_norms)
        ctx.chunk = chunk
        ctx.soft_cap = soft_cap
        return divergences

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """dz_pv = upstream_p (softmax(z_p)_v - softmax(z*_p)_v)."""
        hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, norms, teacher_norms = ctx.saved_tensors

        def subtract_teacher(probabilities: torch.Tensor, chunk_rows: slice) -> None:
            logits = capped_logits(teacher_hidden[chunk_rows], teacher_weight, teacher_bias, ctx.soft_cap)
            probabilities -= logits.sub_(teacher_norms[chunk_rows, None]).exp_()

        gradients = linear_gradients(
            (hidden, weight, bias), ctx.needs_input_grad[:3], norms, upstream, subtract_teacher, ctx.chunk, ctx.soft_cap
        )
        return *gradients, None, None, None, None, None
