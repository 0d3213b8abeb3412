"""The learning rate of every step of a domain, as a function of the step and of the domain's place in the run."""

from __future__ import annotations

import torch
from transformers import get_scheduler

from das_ds.config import TrainConfig

DECAY = "1-sqrt"
"""How wsd and infinite fall: 1 - sqrt(x) over the share x of the decay (Haegele et al., NeurIPS 2024)."""


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer,
    train: TrainConfig,
    num_steps: int,
    *,
    is_first: bool,
    is_last: bool,
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule that `train.lr_scheduler` names, at the first step of a domain.

    What `infinite` differs in from `wsd` is that only the first domain has a warm-up and only the last a decay.

    Args:
        optimizer: its groups have their peak rate as `initial_lr`.
        train: optimisation settings.
        num_steps: steps of the domain.
        is_first: whether the model comes from no domain of this run.
        is_last: whether it goes on to none.
    """
    warmup = round(train.warmup_ratio * num_steps)
    if train.lr_scheduler not in ("wsd", "infinite"):
        return get_scheduler(train.lr_scheduler, optimizer, warmup, num_steps)
    # Both shares are rounded, and together they can be a step too long.
    decay = min(round(train.decay_ratio * num_steps), num_steps - warmup)
    if train.lr_scheduler == "infinite":
        warmup, decay = warmup * is_first, decay * is_last
    specific = {"num_decay_steps": decay, "decay_type": DECAY}
    return get_scheduler("warmup_stable_decay", optimizer, warmup, num_steps, scheduler_specific_kwargs=specific)
