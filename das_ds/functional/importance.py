"""Importance formulas: the score of one gradient, normalization to [0, 1], and accumulation over domains.

Raw importance of a weight or of a unit's gate is a sum of scores of gradients. Normalization tells how far an entry
stands out among those that it is compared with; no form changes when all raw importances are multiplied by a constant.

Shape legend: L layers, U units, C comparisons (entries of a row are compared with each other), E entries of one.
"""

from __future__ import annotations

import torch

from das_ds.config import ImportanceConfig, ImportanceScore
from das_ds.functional.units import UnitValues


def importance_score(gradient: torch.Tensor, weight: torch.Tensor | float, kind: ImportanceScore) -> torch.Tensor:
    """The score of one batch's gradient; raw importance is its sum over batches.

        magnitude     |g|          DAS: Ke et al., ICLR 2023, eq. 2; SPG: Konishi et al., ICML 2023
        square        g^2          diagonal of the empirical Fisher matrix (Kirkpatrick et al., PNAS 2017)
        sensitivity   |g * theta|  |dL/dc| of a gate c = 1 on the weight (SNIP: Lee et al., ICLR 2019, eq. 4)

    A unit's gate is such a c, with theta = 1: there `grad_x_weight` is `abs_grad`.

    Args:
        gradient: dL/dtheta of the mean loss of a batch, any shape and floating dtype.
        weight: theta, in full precision, shaped like the gradient.
        kind: which score.

    Returns:
        Values >= 0, shaped like the gradient.
    """
    match kind:
        case "abs_grad":
            return gradient.abs()
        case "squared_grad":
            return gradient.square()
        case "grad_x_weight":
            return (gradient * weight).abs_()


def elementwise_maximum(new: UnitValues, accumulated: UnitValues | None) -> UnitValues:
    """EMax (paper eq. 3): I^(<=t) = max(I^(t), I^(<=t-1)) per unit; order-free and idempotent.

    Args:
        new: group -> (L, U), of one domain.
        accumulated: of all domains before; None: it is the first.

    Returns:
        Group -> (L, U) in new tensors.
    """
    if accumulated is None:
        return {group: values.clone() for group, values in new.items()}
    return {group: torch.maximum(values, accumulated[group]) for group, values in new.items()}


RANK_FORMS = ("rank_hard", "rank_soft")
"""Forms that need the order of the entries; the others need only statistics."""


def normalize_units(raw: UnitValues, settings: ImportanceConfig) -> UnitValues:
    """Normalize the importance of units within `settings.scope`: layer and group, group, or everything.

    Args:
        raw: group -> (L, U) raw importance, not negative.
        settings: form, its parameters, and scope.

    Returns:
        Group -> (L, U) float32 in [0, 1].
    """
    if settings.scope == "tensor":
        return {group: normalize(values, settings) for group, values in raw.items()}
    if settings.scope == "group":
        return {group: normalize(values.reshape(1, -1), settings).view_as(values) for group, values in raw.items()}
    everything = normalize(torch.cat([values.flatten() for values in raw.values()])[None], settings)[0]
    parts = everything.split([values.numel() for values in raw.values()])
    return {group: part.view_as(raw[group]) for group, part in zip(raw, parts, strict=True)}


def normalize(raw: torch.Tensor, settings: ImportanceConfig) -> torch.Tensor:
    """Normalize each row on its own.

    Args:
        raw: (C, E), not negative.
        settings: form and its parameters.

    Returns:
        (C, E) float32 in [0, 1].
    """
    values = raw.double()
    if settings.normalization in RANK_FORMS:
        return normalize_by_rank(values, settings).float()
    mean = values.mean(dim=1, keepdim=True)
    std = values.std(dim=1, correction=0, keepdim=True)
    largest = values.abs().amax(dim=1, keepdim=True)
    return normalize_by_value(values, mean, std, largest, settings).float()


def normalize_by_value(
    values: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, largest: torch.Tensor, settings: ImportanceConfig
) -> torch.Tensor:
    """The forms that need only statistics, with z = (a - mean) / std of raw importance a:

        abs_tanh: |tanh z|      tanh_positive: tanh(max(z, 0))      saturating: a / (a + c * mean)

    `abs_tanh` is the paper's (Ke et al. 2023, section 3.1); `tanh_positive` protects only entries above the average.
    Where all entries are equal (std = 0) both give 0: nothing stands out.

    `saturating` (c is `half_saturation`) approaches 0 and 1 more slowly than an exponential, and is 0 at a = 0.
    With a the diagonal Fisher information F of a weight (that of EWC, Kirkpatrick et al., PNAS 2017), 1 - I is the
    variance that a Laplace approximation with prior precision c * mean F leaves the weight, 1 / (F + c * mean F), as a
    share of the prior's.

    Args:
        values: float64, any shape, not negative.
        mean, std, largest: float64 mean, population standard deviation and largest magnitude of the values that are
            compared; broadcast to `values`.
        settings: `abs_tanh`, `tanh_positive` or `saturating`.

    Returns:
        float64 in [0, 1], shaped like `values`.
    """
    if settings.normalization == "saturating":
        # Where the mean is 0, all values are.
        return values / (values + settings.half_saturation * torch.where(mean > 0, mean, 1.0))
    # Rounding leaves a std of a few ulp when all values are equal; it must not be blown up to z = 1.
    flat = std <= 1e-12 * largest
    z = torch.where(flat, 0.0, (values - mean) / torch.where(flat, 1.0, std))
    return z.tanh().abs() if settings.normalization == "abs_tanh" else z.clamp_min(0.0).tanh()


def normalize_by_rank(values: torch.Tensor, settings: ImportanceConfig) -> torch.Tensor:
    """The forms that need only the order: with r the fraction of entries that are *less* important than the entry,

        rank_hard: 1 where r >= 1 - s, else 0        rank_soft: r^((1 - s) / s)        s = `protected_fraction`

    Without ties r is uniform over [0, 1): the hard form gives 1 to round(s * E) entries, and the soft one has mean s.
    Equal entries get equal importance: ties across the edge of the hard form are all 0, and so is everything where all
    entries are equal.

    Args:
        values: (C, E).
        settings: `rank_hard` or `rank_soft`.

    Returns:
        (C, E) float64 in [0, 1].
    """
    num_entries = values.shape[1]
    num_less = torch.searchsorted(values.sort(dim=1).values, values.contiguous())
    if settings.normalization == "rank_hard":
        return (num_less >= _least_protected(num_entries, settings.protected_fraction)).double()
    return (num_less.double() / num_entries).pow(_exponent(settings.protected_fraction))


def histogram(num_entries: int, settings: ImportanceConfig, num_levels: int) -> torch.Tensor:
    """How many of E entries must be less important than an entry for it to reach each level of importance.

    The inverse of `normalize_by_rank`, for entries that are too many to be sorted: where exactly l of these counts are
    reached, importance rounded to multiples of 1 / `num_levels` is l / `num_levels`; for `rank_hard`, which has one
    count, it is 1 where that is reached.

    Args:
        num_entries: E.
        settings: `rank_hard` or `rank_soft`.
        num_levels: steps between 0 and 1.

    Returns:
        (1,) int64 for `rank_hard`, else (num_levels,), not falling; E marks a level that nothing reaches.
    """
    if settings.normalization == "rank_hard":
        return torch.tensor([_least_protected(num_entries, settings.protected_fraction)])
    edges = (torch.arange(num_levels, dtype=torch.float64) + 0.5) / num_levels
    shares = edges.pow(1.0 / _exponent(settings.protected_fraction))
    return (num_entries * shares).ceil().clamp_max(num_entries).long()


def _least_protected(num_entries: int, share: float) -> int:
    return num_entries - round(share * num_entries)


def _exponent(share: float) -> float:
    """p for which the mean of r^p over [0, 1) is share: 1 / (p + 1) = share."""
    return (1.0 - share) / share
