"""Steps whose gradient is not finite, as the engine takes them on real ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from das_ds.config import RunConfig
from das_ds.data.batch import Batch
from das_ds.distributed.process_group import init_process_group
from das_ds.distributed.resumable import ResumableLoop
from das_ds.engine.engine import Engine
from das_ds.errors import TrainingError
from das_ds.softmask.measure import PRETRAINING, ImportanceLoss, measure_unit_importance, pretraining_loss
from das_ds.softmask.parameter import sum_over_gradients
from helpers.tiny_models import NO_DROPOUT
from helpers.training import build, rank_part

NUM_STEPS = 4


@dataclass(frozen=True)
class Attempt:
    """What one attempt at a step found and left."""

    step: int
    scale: float
    learning_rates: tuple[float, float]
    moved: bool
    skipped: int


def run_attempts(configs: list[RunConfig], batch: Batch) -> list[list[Attempt]]:
    """Every attempt at `NUM_STEPS` steps on the same batch, per config."""
    return [_attempts(config, batch) for config in configs]


def _attempts(config: RunConfig, batch: Batch) -> list[Attempt]:
    ranks = init_process_group()
    engine = build(config, ranks, **NO_DROPOUT).engine
    part = rank_part(batch, ranks.info.rank, ranks.info.world_size)
    engine.start_domain(NUM_STEPS)
    found: list[Attempt] = []
    for step in range(NUM_STEPS):
        for _ in engine.retry_on_overflow():
            before = _weights(engine)
            rate = engine.learning_rate()
            scale = engine.loss_scale
            for _ in range(engine.accumulation_steps):
                _backward(engine, part)
                engine.step()
            after = _weights(engine)
            moved = any(not torch.equal(before[name], after[name]) for name in before)
            found.append(Attempt(step, scale, (rate, engine.learning_rate()), moved, engine.skipped_steps))
    engine.start_domain(NUM_STEPS)
    assert engine.skipped_steps == 0 and engine.loss_scale == found[0].scale
    engine.close()
    return found


def collect_errors(configs: list[RunConfig], batch: Batch) -> list[str]:
    """The error that ends the attempts, per config."""
    errors = []
    for config in configs:
        try:
            _attempts(config, batch)
        except TrainingError as failure:
            errors.append(str(failure))
    return errors


def left_out(configs: list[RunConfig], batch: Batch) -> list[tuple[int, bool, str]]:
    """Per config, a step with an infinite loss where there is no loss scale: (skipped steps, whether anything moved,
    the error that the same gradient gives while importance is measured)."""
    return [_left_out(config, batch) for config in configs]


def _left_out(config: RunConfig, batch: Batch) -> tuple[int, bool, str]:
    ranks = init_process_group()
    engine = build(config, ranks, **NO_DROPOUT).engine
    part = rank_part(batch, ranks.info.rank, ranks.info.world_size)
    engine.start_domain(NUM_STEPS)
    before = _weights(engine)
    rate = engine.learning_rate()
    for _ in engine.retry_on_overflow():
        _step(engine, part, torch.inf)
    after = _weights(engine)
    moved = rate != engine.learning_rate() or any(not torch.equal(before[name], after[name]) for name in before)
    skipped = engine.skipped_steps
    error = "none"
    try:
        with engine.accumulate_importance("abs_grad"):
            for _ in engine.retry_on_overflow():
                _step(engine, part, torch.inf)
    except TrainingError as failure:
        error = str(failure)
    engine.close()
    return skipped, moved, error


def infinite_importance(configs: list[RunConfig], batch: Batch) -> list[list[str]]:
    """Per config, the errors of both importance passes over a loss that is not finite on rank 0 alone."""
    return [_infinite_importance(config, batch) for config in configs]


def _infinite_importance(config: RunConfig, batch: Batch) -> list[str]:
    ranks = init_process_group()
    run = build(config, ranks, **NO_DROPOUT)
    part = rank_part(batch, ranks.info.rank, ranks.info.world_size)
    loss = _scaled_loss(torch.inf if ranks.info.is_main else 1.0)
    errors = []
    for measure in (
        lambda: measure_unit_importance(run, ResumableLoop([part]), loss, "abs_grad"),
        lambda: sum_over_gradients(run, ResumableLoop([[part] * run.engine.accumulation_steps]), loss, "squared_grad"),
    ):
        try:
            measure()
        except TrainingError as failure:
            errors.append(str(failure))
    run.engine.close()
    return errors


def _scaled_loss(factor: float) -> ImportanceLoss:
    return replace(PRETRAINING, of_sequences=lambda forward, batch: pretraining_loss(forward, batch) * factor)


def _step(engine: Engine, part: Batch, factor: float) -> None:
    for _ in range(engine.accumulation_steps):
        _backward(engine, part, factor)
        engine.step()


def _backward(engine: Engine, part: Batch, factor: float = 1.0) -> None:
    _, losses = engine(part.corrupted_ids, part.predicted, part.targets)
    engine.backward(losses.sum() * factor)


def _weights(engine: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in engine.weights.fp32_weights()}
