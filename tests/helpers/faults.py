"""Training on random batches in which chosen steps go wrong, on real ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from das_ds.config import RunConfig
from das_ds.data.batches import Batch
from das_ds.distributed.launch import Ranks
from das_ds.evaluation.results import Results
from das_ds.methods import METHODS
from das_ds.methods.base import Losses, Method
from das_ds.training.run import run_sequence
from helpers.half import allow_fp16_on_cpu


def run_with_fault(values: dict[str, Any], kind: str, at: int) -> Results:
    """A run whose optimizer step number `at` (from 0, as it is first reached) has a bad loss or gradient on rank 1."""
    allow_fp16_on_cpu()
    ranks, config = Ranks(), RunConfig(**values)
    method = METHODS[config.method.name]
    micro_step, calls = method.micro_step, 0
    per_step = config.train.global_batch_size // config.train.micro_batch_size // ranks.info.world_size

    @contextmanager
    def faulty(self: Method, batch: Batch, token_scale: torch.Tensor) -> Iterator[Losses]:
        nonlocal calls
        with micro_step(self, batch, token_scale) as losses:
            is_bad = calls // per_step == at and ranks.info.rank == ranks.info.world_size - 1
            calls += 1
            yield _spoiled(losses, kind) if is_bad else losses

    method.micro_step = faulty  # type: ignore[assignment,method-assign]
    try:
        return run_sequence(config, ranks)
    finally:
        method.micro_step = micro_step  # type: ignore[method-assign]


def _spoiled(losses: Losses, kind: str) -> Losses:
    name, loss = next(iter(losses.items()))
    factor = {"nan": float("nan"), "spike": 1000.0}.get(kind)
    if factor is not None:
        return {**losses, name: loss * factor}
    return {**losses, name: _Explode.apply(loss)}


class _Explode(torch.autograd.Function):
    """The value stays as it is; its gradient is infinite."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * float("inf")
