"""One domain: micro-steps with the method's losses, optimizer steps, metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

from das_ds.config import TrainConfig
from das_ds.data.batches import Batch
from das_ds.distributed.collectives import all_reduce_sum
from das_ds.distributed.engine import Engine
from das_ds.errors import TrainingError
from das_ds.methods.base import Method
from das_ds.tracking.names import (
    DOMAIN,
    DOMAIN_STEP,
    GRAD_NORM,
    LEARNING_RATE,
    LOSS,
    PEAK_MEMORY_GIB,
    SKIPPED_STEPS,
    TOKENS_PER_S,
    TOKENS_SEEN,
    loss_part,
)
from das_ds.tracking.throughput import Throughput, peak_memory_gib
from das_ds.tracking.tracker import Tracker


@dataclass(frozen=True)
class Progress:
    """Where the run stood when the domain began."""

    domain: str
    global_step: int
    tokens_seen: int
    tokens_per_step: int


class LossMeter:
    """Means of named losses since they were last taken, summed on the device so that no step waits for the host."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._num_micro_steps = 0

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        """Add one micro-step's losses."""
        self._num_micro_steps += 1
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + loss.detach()

    def take(self, world_size: int) -> dict[str, float]:
        """Means over micro-steps and ranks (a collective), and start anew."""
        values = all_reduce_sum(torch.stack(list(self._sums.values()))) / (self._num_micro_steps * world_size)
        means = dict(zip(self._sums, values.tolist(), strict=True))
        self._sums, self._num_micro_steps = {}, 0
        return means


class DomainTrainer:
    """Runs the optimizer steps of one domain."""

    def __init__(self, engine: Engine, method: Method, tracker: Tracker, train: TrainConfig) -> None:
        self._engine = engine
        self._method = method
        self._tracker = tracker
        self._train = train
        self._device = engine.ranks.info.device

    def run(self, steps: Iterator[list[Batch]], progress: Progress) -> None:
        """Train on one list of micro-batches per optimizer step.

        Raises:
            TrainingError: the loss is no longer finite.
        """
        num_steps = self._train.steps_per_domain
        self._engine.start_domain(num_steps)
        self._engine.module.train()
        meter, throughput = LossMeter(), Throughput()
        is_main = self._engine.ranks.info.is_main
        bar = tqdm(steps, f"train {progress.domain}", num_steps, disable=not is_main, unit="step", dynamic_ncols=True)
        for step, micro_batches in enumerate(bar, start=1):
            is_logged = step % self._train.log_every == 0 or step == num_steps
            learning_rate = self._engine.learning_rate()
            norm = self._optimizer_step(micro_batches, meter, measure_norm=is_logged)
            throughput.add(progress.tokens_per_step)
            if is_logged:
                assert norm is not None, "an optimizer step that is logged has a gradient norm"
                losses = meter.take(self._engine.ranks.info.world_size)
                self._log(progress, step, losses, learning_rate, norm, throughput.take())
                bar.set_postfix(loss=f"{sum(losses.values()):.3f}", refresh=False)

    def _optimizer_step(
        self, micro_batches: list[Batch], meter: LossMeter, *, measure_norm: bool
    ) -> torch.Tensor | float | None:
        token_scale = self._token_scale(micro_batches)
        norm = None
        for attempt in self._engine.attempts():
            for batch in micro_batches:
                with self._method.micro_step(batch.to(self._device, non_blocking=True), token_scale) as losses:
                    self._engine.backward(torch.stack(list(losses.values())).sum())
                # A step that is tried again counts once.
                if attempt == 0:
                    meter.add(losses)
                norm = self._engine.step(measure_norm=measure_norm)
        return norm

    def _token_scale(self, micro_batches: list[Batch]) -> torch.Tensor:
        """ranks * micro-steps / predicted tokens of the global batch: DeepSpeed's averages undo the first two."""
        num_predicted = sum(batch.num_predicted for batch in micro_batches)
        # Filled on the device: a copy from the host would make every step wait for it.
        count = torch.full((), num_predicted, dtype=torch.float32, device=self._device)
        all_reduce_sum(count)
        return self._engine.ranks.info.world_size * len(micro_batches) / count.clamp_min(1.0)

    def _log(
        self,
        progress: Progress,
        step: int,
        losses: dict[str, float],
        learning_rate: float,
        norm: torch.Tensor | float,
        tokens_per_s: float,
    ) -> None:
        loss = sum(losses.values())
        if not math.isfinite(loss):
            raise TrainingError(
                f"loss of {progress.domain} is {loss} within the {self._train.log_every} steps up to step {step}, "
                "expected a finite number; lower train.learning_rate, clip with train.grad_clip or train in fp32"
            )
        self._tracker.log(
            {
                DOMAIN: progress.domain,
                DOMAIN_STEP: step,
                TOKENS_SEEN: progress.tokens_seen + step * progress.tokens_per_step,
                LOSS: loss,
                **{loss_part(name): value for name, value in losses.items()},
                LEARNING_RATE: learning_rate,
                GRAD_NORM: float(norm),
                SKIPPED_STEPS: self._engine.skipped_steps,
                TOKENS_PER_S: tokens_per_s,
                PEAK_MEMORY_GIB: peak_memory_gib(),
            },
            global_step=progress.global_step + step,
        )
