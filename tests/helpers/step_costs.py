"""Host operations of an optimizer step, counted, and the norm that it clips by, compared with one in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from das_ds.config import RunConfig
from das_ds.data.batch import Batch
from das_ds.distributed.process_group import init_process_group
from das_ds.engine.engine import Engine
from das_ds.engine.zero import get_gradients
from helpers.tiny_models import NO_DROPOUT
from helpers.training import build, rank_part

READ = "aten._local_scalar_dense.default"
"""What `item()`, `bool()` and `float()` of a tensor come down to: on a GPU the host waits for it."""


@dataclass(frozen=True)
class StepCosts:
    """Of one optimizer step of one micro-step: what DeepSpeed does around the optimizer, whose own kernel on a GPU is
    another one and reads nothing."""

    num_parameters: int
    reads_in_backward: int
    reads_in_step: int
    operations: int
    """Kernels that a GPU would be given, in the step alone."""


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def measure_costs(configs: list[RunConfig], batch: Batch) -> list[StepCosts]:
    """Of a step that is not the first, per config; one ZeRO stage in all of them."""
    return [_costs(config, batch) for config in configs]


def _costs(config: RunConfig, batch: Batch) -> StepCosts:
    ranks = init_process_group()
    engine = build(config, ranks, **NO_DROPOUT).engine
    part = rank_part(batch, ranks.info.rank, ranks.info.world_size)
    engine.start_domain(3)
    for _ in range(2):
        _backward(engine, part)
        engine.step()
    _, losses = engine(part.corrupted_ids, part.predicted, part.targets)
    with _Counter() as backward:
        engine.backward(losses.mean())
    alone = engine._optimizer.step
    with _Counter() as step, patch.object(engine._optimizer, "step", lambda: _uncounted(alone)):
        engine.step()
    engine.close()
    return StepCosts(
        len(engine.parameters), backward.calls[READ], step.calls[READ], sum(step.calls.values()) - step.calls[READ]
    )


def _uncounted(do: Callable[[], Any]) -> Any:
    with _disable_current_modes():
        return do()


def measure_norms(configs: list[RunConfig], batch: Batch) -> list[tuple[float, float]]:
    """Per config, (norm that a step gives, square of this rank's part of it in float64)."""
    return [_norms(config, batch) for config in configs]


def _norms(config: RunConfig, batch: Batch) -> tuple[float, float]:
    ranks = init_process_group()
    run = build(config, ranks, **NO_DROPOUT)
    engine = run.engine
    part = rank_part(batch, ranks.info.rank, ranks.info.world_size)
    engine.start_domain(3)
    _backward(engine, part)
    averaged = get_gradients(engine._engine, engine.weights.shards, engine.parameters)()
    square = sum(gradient.double().square().sum() for gradient in averaged) / engine.loss_scale**2
    norm = engine.step(measure_norm=True)
    engine.close()
    assert norm is not None
    return float(norm), float(square)


def shares_beyond_bf16(configs: list[RunConfig], batch: Batch) -> list[float]:
    """Per config, the share of this rank's averaged gradient that bf16 cannot hold."""
    return [_share_beyond_bf16(config, batch) for config in configs]


def _share_beyond_bf16(config: RunConfig, batch: Batch) -> float:
    ranks = init_process_group()
    engine = build(config, ranks, **NO_DROPOUT).engine
    engine.start_domain(3)
    _backward(engine, rank_part(batch, ranks.info.rank, ranks.info.world_size))
    averaged = torch.cat(get_gradients(engine._engine, engine.weights.shards, engine.parameters)())
    engine.step()
    engine.close()
    return (averaged != averaged.bfloat16().to(averaged.dtype)).float().mean().item()


def _backward(engine: Engine, part: Batch) -> None:
    _, losses = engine(part.corrupted_ids, part.predicted, part.targets)
    engine.backward(losses.mean())
