"""Algebra of unit importance: per-sequence gate gradients -> [0, 1] -> accumulated over domains.

Shape legend: L layers, U units.
"""

from __future__ import annotations

import torch

from das_ds.functional.units import Importance


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
    mean, std = values.mean(dim=1, keepdim=True), values.std(dim=1, correction=0, keepdim=True)
    return squash(values, mean, std, values.abs().amax(dim=1, keepdim=True), form).float()


def squash(
    values: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, largest: torch.Tensor, form: str
) -> torch.Tensor:
    """|tanh z| or tanh(max(z, 0)) of z = (values - mean) / std, and 0 where std is 0.

    Args:
        values: float64, any shape.
        mean, std, largest: float64 mean, population standard deviation and largest magnitude of the values that are
            compared; broadcast to `values`.
        form: `abs_tanh` or `tanh_positive`.

    Returns:
        float64 in [0, 1], shaped like `values`.

    Raises:
        ValueError: another form.
    """
    # Rounding leaves a std of a few ulp when all values are equal; it must not be blown up to z = 1.
    flat = std <= 1e-12 * largest
    z = torch.where(flat, 0.0, (values - mean) / torch.where(flat, 1.0, std))
    if form == "abs_tanh":
        return z.tanh().abs()
    if form == "tanh_positive":
        return z.clamp_min(0.0).tanh()
    raise ValueError(f"unknown normalisation {form!r}; allowed: abs_tanh, tanh_positive")


def elementwise_maximum(new: Importance, accumulated: Importance | None) -> Importance:
    """EMax (paper eq. 3): I^(<=t) = max(I^(t), I^(<=t-1)) per unit; order-free, idempotent; None is the empty start."""
    if accumulated is None:
        return {group: values.clone() for group, values in new.items()}
    return {group: torch.maximum(values, accumulated[group]) for group, values in new.items()}
