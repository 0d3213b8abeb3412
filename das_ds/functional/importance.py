"""Importance of units accumulated over domains."""

from __future__ import annotations

import torch

from das_ds.functional.units import Importance


def elementwise_maximum(new: Importance, accumulated: Importance | None) -> Importance:
    """EMax (paper eq. 3): I^(<=t) = max(I^(t), I^(<=t-1)) per unit; order-free, idempotent; None is the empty start."""
    if accumulated is None:
        return {group: values.clone() for group, values in new.items()}
    return {group: torch.maximum(values, accumulated[group]) for group, values in new.items()}
