"""Optimizer moments that are kept at the border of two domains, on real ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from das_ds.config import RunConfig
from das_ds.distributed.process_group import init_process_group
from das_ds.methods import build_method
from das_ds.tracking.tracker import Tracker
from das_ds.training.domain_trainer import DomainProgress, DomainTrainer
from helpers.parity import ACCUMULATION, ROWS
from helpers.tiny_models import NO_DROPOUT
from helpers.training import LENGTH, build, random_batch, rank_part

NUM_STEPS = 6
FACTOR = 0.25


@dataclass(frozen=True)
class QuarterMask:
    """A gradient mask that leaves a quarter of every gradient."""

    def apply_(self, gradients: Sequence[torch.Tensor]) -> None:
        """gradient <- gradient / 4."""
        for gradient in gradients:
            gradient.mul_(FACTOR)


def train_in_domains(config: RunConfig, lengths: list[int], *, keeps_moments: bool) -> dict[str, torch.Tensor]:
    """Final fp32 weights after the same steps, divided into domains of these lengths."""
    run, parts = _build(config)
    engine = run.engine
    first = 0
    for length in lengths:
        engine.start_domain(length, keeps_moments=keeps_moments and first > 0)
        progress = DomainProgress("domain", first, 0, config.train.global_batch_size * LENGTH, length)
        trainer = DomainTrainer(engine, build_method(run), Tracker([]), config.train)
        trainer.run(iter(parts[first : first + length]), progress)
        first += length
    weights = {name: weight.detach().clone() for name, weight in engine.weights.fp32_weights()}
    engine.close()
    return weights


def train_once_and_divided(config: RunConfig) -> list[dict[str, torch.Tensor]]:
    """The weights of one domain, of three that keep moments, and of three that do not."""
    return [
        train_in_domains(config, [NUM_STEPS], keeps_moments=False),
        train_in_domains(config, [3, 1, 2], keeps_moments=True),
        train_in_domains(config, [3, 1, 2], keeps_moments=False),
    ]


def mask_kept_moments(config: RunConfig) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """State of each kind on this rank after a domain, and at the start of the next one under a mask of gradients."""
    run, parts = _build(config)
    engine = run.engine
    engine.start_domain(2)
    progress = DomainProgress("domain", 0, 0, config.train.global_batch_size * LENGTH, 2)
    DomainTrainer(engine, build_method(run), Tracker([]), config.train).run(iter(parts[:2]), progress)
    before = _moments(engine)
    engine.start_domain(2, keeps_moments=True)
    engine.set_gradient_mask(QuarterMask())
    engine.mask_first_moments()
    after = _moments(engine)
    engine.close()
    return {key: (value, after[key]) for key, value in before.items()}


def _moments(engine: Any) -> dict[str, torch.Tensor]:
    state = engine.state_dict()
    shards = engine.weights.shards
    return {
        name: torch.cat([flats[shard.flat][shard.span].clone() for shard in shards])
        for name, flats in state.sharded.items()
    } | {"step": torch.tensor(float(state.metadata["optimizer"]["step"]))}


def _build(config: RunConfig) -> tuple[Any, list[list[Any]]]:
    ranks = init_process_group()
    info = ranks.info
    steps = [[random_batch(ROWS, 70 + ACCUMULATION * step + m) for m in range(ACCUMULATION)] for step in range(6)]
    parts = [[rank_part(batch, info.rank, info.world_size) for batch in step] for step in steps]
    return build(config, ranks, **NO_DROPOUT), parts
