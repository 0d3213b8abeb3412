"""One domain: micro-steps with the method's losses, optimizer steps, metrics."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from das_ds.config import FaultsConfig, TrainConfig
from das_ds.data.batch import Batch
from das_ds.distributed.collectives import all_reduce_sum
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.engine.engine import Engine
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
from das_ds.training.loss_guard import LossGuard, Verdict

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where the run stood when the domain began, and how long it is."""

    domain: str
    global_step: int
    tokens_seen: int
    tokens_per_step: int
    num_steps: int


class RollbackError(Exception):
    """The run has to go back to the newest checkpoint; the guard knows which step it leaves out then."""


class LossMeter:
    """Means of named losses over the steps since they were last taken."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._num_steps = 0

    def add(self, losses: dict[str, float]) -> None:
        """Add one step's losses."""
        self._num_steps += 1
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + loss

    def take(self) -> dict[str, float]:
        """Means over steps, and start anew; {} where there was no step."""
        means = {name: total / self._num_steps for name, total in self._sums.items()}
        self._sums, self._num_steps = {}, 0
        return means

    def state(self) -> dict[str, Any]:
        """What a run that continues needs."""
        return {"sums": dict(self._sums), "num_steps": self._num_steps}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self._sums, self._num_steps = dict(state["sums"]), state["num_steps"]


class DomainTrainer:
    """Runs the optimizer steps of one domain.

    Args:
        engine, method, tracker, train: of the run.
        guard: judges every step.
        after_step: called after every step but the last with the number of steps done.
        at: told the place within a step and its number.
        costs: metrics of checkpoints saved since the last line, for the next one.
    """

    def __init__(
        self,
        engine: Engine,
        method: Method[Any],
        tracker: Tracker,
        train: TrainConfig,
        *,
        guard: LossGuard | None = None,
        after_step: Callable[[int], None] = lambda step: None,
        at: Callable[[str, int], None] = lambda place, step: None,
        costs: Callable[[], dict[str, float]] = dict,
    ) -> None:
        self._engine, self._method, self._tracker, self._train = engine, method, tracker, train
        self._device = engine.ranks.info.device
        self._guard = guard or LossGuard(FaultsConfig())
        self._meter = LossMeter()
        self._after_step, self._at, self._costs = after_step, at, costs

    def state(self) -> ComponentState:
        """What a run that continues within the domain needs."""
        return ComponentState(numbers=self._meter.state())

    def load_state(self, saved: SavedComponentState) -> None:
        """Continue within the domain."""
        self._meter.load(saved.numbers)

    def run(self, steps: Iterator[list[Batch]], progress: Progress, *, first_step: int = 0) -> None:
        """Train on one list of micro-batches per optimizer step; the engine is at the start or within the domain.

        Args:
            steps: those after `first_step`.
            progress: where the run stood when the domain began.
            first_step: steps done already.

        Raises:
            TrainingError: a loss or gradient that is not finite, or a spike, where the guard says stop.
            RewindError: the same where it says rewind.
        """
        num_steps = progress.num_steps
        self._engine.module.train()
        throughput = Throughput()
        bar = tqdm(
            steps,
            f"train {progress.domain}",
            num_steps,
            initial=first_step,
            disable=not self._engine.ranks.info.is_main,
            unit="step",
            dynamic_ncols=True,
        )
        for step, micro_batches in enumerate(bar, start=first_step + 1):
            self._at("forward and backward", step)
            is_logged = step % self._train.log_interval == 0 or step == num_steps
            learning_rate, norm = self._engine.learning_rate(), None
            if self._guard.is_skipped(step):
                self._engine.skipped_steps += 1
            else:
                norm = self._optimizer_step(step, micro_batches, measure_norm=is_logged)
            throughput.add(progress.tokens_per_step)
            if is_logged:
                losses = self._meter.take()
                self._log(progress, step, losses, learning_rate, norm, throughput.pop_rate())
                bar.set_postfix(loss=f"{sum(losses.values()):.3f}", refresh=False)
            self._at("between steps", step)
            if step < num_steps:
                with throughput.paused():
                    self._after_step(step)
                self._at("reading a batch", step + 1)

    def _optimizer_step(
        self, step: int, micro_batches: list[Batch], *, measure_norm: bool
    ) -> torch.Tensor | float | None:
        token_scale = self._token_scale(micro_batches)
        verdict, norm = Verdict("take"), None
        for attempt in self._engine.retry_on_overflow():
            totals: dict[str, torch.Tensor] = {}
            self._method.on_step_start(step)
            for number, batch in enumerate(micro_batches, start=1):
                with self._method.losses(batch.to(self._device, non_blocking=True), token_scale) as losses:
                    self._engine.backward(torch.stack(list(losses.values())).sum())
                for name, loss in losses.items():
                    totals[name] = totals.get(name, 0.0) + loss.detach()
                # A step that is tried again is judged and counts once.
                if number == len(micro_batches) and attempt == 0:
                    means = self._means(totals, len(micro_batches))
                    verdict = self._guard.check_loss(sum(means.values()), step)
                    if verdict.action == "take":
                        self._meter.add(means)
                self._at("optimizer step", step)
                norm = self._engine.step(measure_norm=measure_norm, refuse=verdict.action != "take")
            if verdict.action != "take":
                break
        if verdict.action == "take" and not self._engine.step_was_applied:
            verdict = self._guard.check_gradient(step)
        self._apply_decision(verdict)
        return norm

    def _apply_decision(self, verdict: Verdict) -> None:
        if verdict.action == "stop":
            raise TrainingError(verdict.message)
        if verdict.message is not None and self._engine.ranks.info.is_main:
            logger.warning(verdict.message)
        if verdict.action == "rewind":
            raise RollbackError(verdict.message)

    def _means(self, totals: dict[str, torch.Tensor], num_micro_steps: int) -> dict[str, float]:
        """Means of named losses over micro-steps and ranks; the optimizer step, which follows, would wait as well."""
        values = all_reduce_sum(torch.stack(list(totals.values())))
        scale = num_micro_steps * self._engine.ranks.info.world_size
        return dict(zip(totals, (values / scale).tolist(), strict=True))

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
        norm: torch.Tensor | float | None,
        tokens_per_s: float,
    ) -> None:
        self._tracker.log(
            {
                DOMAIN: progress.domain,
                DOMAIN_STEP: step,
                TOKENS_SEEN: progress.tokens_seen + step * progress.tokens_per_step,
                # No number where every step since the last line was left out.
                LOSS: sum(losses.values()) if losses else math.nan,
                **{loss_part(name): value for name, value in losses.items()},
                LEARNING_RATE: learning_rate,
                GRAD_NORM: math.nan if norm is None else float(norm),
                SKIPPED_STEPS: self._engine.skipped_steps,
                TOKENS_PER_S: tokens_per_s,
                PEAK_MEMORY_GIB: peak_memory_gib(),
                **self._costs(),
            },
            global_step=progress.global_step + step,
        )
