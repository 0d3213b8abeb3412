"""Learning-rate schedulers: the rate of every step of a domain, by the step and the domain's position in the run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from transformers import get_scheduler

from das_ds.config import TrainConfig

DECAY = "1-sqrt"
"""Shape of the decay of wsd and infinite: 1 - sqrt(x) at fraction x of it (Haegele et al., NeurIPS 2024)."""


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer,
    train: TrainConfig,
    num_steps: int,
    *,
    is_first: bool,
    is_last: bool,
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule that `train.lr_scheduler` names, at the first step of a domain.

    `infinite` is `wsd` with a warm-up in the first domain only and a decay in the last only. After the warm-up a factor
    f of the peak that falls from 1 to 0 becomes r + (1 - r) f, with r = `train.min_lr_ratio`.

    Args:
        optimizer: its groups have their peak rate as `initial_lr`.
        train: optimization settings of the domain.
        num_steps: steps of the domain.
        is_first: whether it is the first domain of the run.
        is_last: whether it is the last.
    """
    warmup = round(train.warmup_ratio * num_steps)
    # Both fractions are rounded: their sum can exceed the domain by one step.
    decay = min(round(train.decay_ratio * num_steps), num_steps - warmup)
    if train.lr_scheduler == "infinite":
        warmup = warmup if is_first else 0
        decay = decay if is_last else 0
    if train.lr_scheduler in ("wsd", "infinite"):
        specific = {"num_decay_steps": decay, "decay_type": DECAY}
        scheduler = get_scheduler(
            "warmup_stable_decay", optimizer, warmup, num_steps, scheduler_specific_kwargs=specific
        )
    else:
        scheduler = get_scheduler(train.lr_scheduler, optimizer, warmup, num_steps)
    if train.min_lr_ratio:
        # The rate of the first step, already set, is the same: it is in the warm-up or the peak.
        scheduler.lr_lambdas = [
            partial(_with_minimum, factor, warmup, train.min_lr_ratio) for factor in scheduler.lr_lambdas
        ]
    return scheduler


def _with_minimum(factor: Callable[[int], float], warmup: int, minimum: float, step: int) -> float:
    """The factor of a step of a schedule that ends at `minimum` instead of 0."""
    return factor(step) if step < warmup else minimum + (1.0 - minimum) * factor(step)
