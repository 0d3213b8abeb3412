"""Algebra of unit importance: per-sequence gate gradients -> [0, 1] -> accumulated over domains.

Shape legend: B sequences, L layers, U units.
"""

from __future__ import annotations

import torch

from das_ds.functional.units import Importance


def absolute_sum(gate_gradient: torch.Tensor, row_weights: torch.Tensor) -> torch.Tensor:
    """Sum over sequences of |dL(x_n) / dg|, the numerator of paper eq. 2.

    Args:
        gate_gradient: (B, U); row n is the gate gradient of sequence n alone.
        row_weights: (B,) 1, or 0 for rows that only pad the batch.

    Returns:
        (U,) float32.
    """
    return (gate_gradient.float().abs() * row_weights.float()[:, None]).sum(dim=0)


def normalise(importance: torch.Tensor, form: str) -> torch.Tensor:
    """Standardise each layer and squash to [0, 1]: z = (I - mean) / std, then |tanh z| or tanh(max(z, 0)).

    `abs_tanh` is the paper's form (section 3.1); `tanh_positive` protects only units above their layer's average.
    A layer whose units are all equally important (std = 0) gives 0, since no unit stands out.

    Args:
        importance: (L, U) mean absolute gate gradients.
        form: `abs_tanh` or `tanh_positive`.

    Returns:
        (L, U) float32 in [0, 1].

    Raises:
        ValueError: another form.
    """
    values = importance.double()
    deviation = values - values.mean(dim=1, keepdim=True)
    std = values.std(dim=1, correction=0, keepdim=True)
    # Rounding leaves a std of a few ulp when all units are equal; it must not be blown up to z = 1.
    flat = std <= 1e-12 * values.abs().amax(dim=1, keepdim=True)
    z = torch.where(flat, 0.0, deviation / torch.where(flat, 1.0, std))
    if form == "abs_tanh":
        return z.tanh().abs().float()
    if form == "tanh_positive":
        return z.clamp_min(0.0).tanh().float()
    raise ValueError(f"unknown normalisation {form!r}; allowed: abs_tanh, tanh_positive")


def elementwise_maximum(new: Importance, accumulated: Importance | None) -> Importance:
    """EMax (paper eq. 3): I^(<=t) = max(I^(t), I^(<=t-1)) per unit; order-free, idempotent; None is the empty start."""
    if accumulated is None:
        return {group: values.clone() for group, values in new.items()}
    return {group: torch.maximum(values, accumulated[group]) for group, values in new.items()}
