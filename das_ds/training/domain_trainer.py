"""Training loop over the optimizer steps of one domain: the method's losses, loss checks, and logged metrics.

`trainer.ContinualTrainer` has what comes before and after these steps: importance, export, evaluation.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from das_ds.config import FaultsConfig, TrainConfig
from das_ds.data.batch import Batch
from das_ds.distributed.collectives import all_reduce_sum
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.engine.engine import Engine
from das_ds.errors import TrainingError
from das_ds.methods.base import Method
from das_ds.progress import Progress
from das_ds.tracking.names import (
    DATA_WAIT,
    DOMAIN,
    DOMAIN_STEP,
    GRAD_NORM,
    LEARNING_RATE,
    LOSS,
    PEAK_MEMORY_GIB,
    SKIPPED_STEPS,
    TOKENS_PER_S,
    TOKENS_SEEN,
    group_norm,
    loss_part,
)
from das_ds.tracking.throughput import Rate, Throughput, Utilization, peak_memory_gib
from das_ds.tracking.tracker import Tracker
from das_ds.training.callbacks import Callbacks, LoggedStep
from das_ds.training.loss_guard import LossGuard, Verdict

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DomainProgress:
    """Progress of the run when the domain began, and the domain's length."""

    domain: str
    global_step: int
    tokens_seen: int
    tokens_per_step: int
    num_steps: int
    evaluate_every: int | None = None
    """Steps between two evaluations, at which metrics are logged too."""

    def is_logged(self, step: int, log_interval: int) -> bool:
        """Whether metrics are logged after a step."""
        is_evaluated = self.evaluate_every is not None and step % self.evaluate_every == 0
        return step % log_interval == 0 or step == self.num_steps or is_evaluated


class RollbackError(Exception):
    """The run has to return to the latest checkpoint; the loss guard knows which step it skips then."""


class LossMeter:
    """Means of named losses over the steps since the last `pop_means`."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._num_steps = 0

    def add(self, losses: dict[str, float]) -> None:
        """Add one step's losses."""
        self._num_steps += 1
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + loss

    def pop_means(self) -> dict[str, float]:
        """Means over steps, and reset; {} where there was no step."""
        means = {name: total / self._num_steps for name, total in self._sums.items()}
        self._sums = {}
        self._num_steps = 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """JSON values for `load_state_dict`."""
        return {"sums": dict(self._sums), "num_steps": self._num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self._sums = dict(state["sums"])
        self._num_steps = state["num_steps"]


class DomainTrainer:
    """Runs the optimizer steps of one domain.

    Args:
        engine, method, tracker, train: of the run.
        guard: checks every step; None: with the defaults of `FaultsConfig`.
        callbacks: called during and between steps.
        utilization: for FLOP/s in the metrics; None: none.
    """

    def __init__(
        self,
        engine: Engine,
        method: Method[Any],
        tracker: Tracker,
        train: TrainConfig,
        *,
        guard: LossGuard | None = None,
        callbacks: Callbacks | None = None,
        utilization: Utilization | None = None,
    ) -> None:
        self._engine = engine
        self._method = method
        self._tracker = tracker
        self._train = train
        self._device = engine.ranks.info.device
        self._world_size = engine.ranks.info.world_size
        self._is_main = engine.ranks.info.is_main
        self._guard = guard or LossGuard(FaultsConfig())
        self._callbacks = callbacks or Callbacks()
        self._utilization = utilization
        self._meter = LossMeter()

    def state_dict(self) -> ComponentState:
        """Losses that are not logged yet."""
        return ComponentState(metadata=self._meter.state_dict())

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """Resume within the domain."""
        self._meter.load_state_dict(saved.metadata)

    def run(self, steps: Iterator[list[Batch]], progress: DomainProgress, *, first_step: int = 0) -> int:
        """Train on one list of micro-batches per optimizer step; the engine has started the domain or resumed it.

        Args:
            steps: those after `first_step`.
            progress: of the run when the domain began.
            first_step: number of steps already done.

        Returns:
            Number of steps done: all of the domain's, unless the callbacks ended it before.

        Raises:
            TrainingError: a loss or gradient that is not finite, or a spike, where the guard says stop.
            RollbackError: one of these where it says rewind.
        """
        num_steps = progress.num_steps
        self._engine.module.train()
        throughput = Throughput()
        last_logged = first_step
        bar = Progress(
            throughput.waiting_for(steps),
            f"train {progress.domain}",
            num_steps,
            initial=first_step,
            unit="steps",
            show=self._is_main,
            # Logged steps are printed by the callbacks.
            plain_lines=False,
        )
        for step, micro_batches in enumerate(bar, start=first_step + 1):
            self._callbacks.on_progress("forward and backward", step)
            is_logged = progress.is_logged(step, self._train.log_interval)
            # Read before the step, which advances the schedule.
            learning_rate = self._engine.learning_rate()
            grad_norm = None
            if self._guard.is_skipped(step):
                self._engine.skipped_steps += 1
            else:
                grad_norm = self.train_step(step, micro_batches, measure_norm=is_logged)
            throughput.add(progress.tokens_per_step)
            if is_logged:
                losses = self._meter.pop_means()
                rate = throughput.pop_rate()
                self._log(progress, step, losses, learning_rate, grad_norm, rate)
                new_steps = step - last_logged
                last_logged = step
                logged = LoggedStep(
                    domain=progress.domain,
                    step=step,
                    num_steps=num_steps,
                    steps_since_last=new_steps,
                    seconds=new_steps * progress.tokens_per_step / rate.tokens_per_s if rate.tokens_per_s else 0.0,
                    # NaN where every step since the last line was skipped.
                    loss=sum(losses.values()) if losses else math.nan,
                    learning_rate=learning_rate,
                    tokens_per_s=rate.tokens_per_s,
                )
                bar.set_postfix(self._callbacks.on_step_logged(logged))
            self._callbacks.on_progress("between steps", step)
            if step < num_steps:
                with throughput.paused():
                    ends = self._callbacks.on_step_end(step)
                if ends:
                    return step
                self._callbacks.on_progress("reading a batch", step + 1)
        return num_steps

    def train_step(self, step: int, micro_batches: list[Batch], *, measure_norm: bool) -> torch.Tensor | float | None:
        """One optimizer step over this rank's micro-batches, which all ranks take together.

        Args:
            step: its number in the domain, from 1.
            micro_batches: equally many on every rank.
            measure_norm: whether the gradient norm is wanted.

        Returns:
            Norm of the averaged gradient before clipping; None unless measured.

        Raises:
            TrainingError, RollbackError: see `run`.
        """
        token_scale = self._token_scale(micro_batches)
        verdict = Verdict("accept")
        grad_norm = None
        # More than one attempt only in fp16: after an overflow the same step runs again at a lower loss scale.
        for attempt in self._engine.retry_on_overflow():
            totals: dict[str, torch.Tensor] = {}
            self._method.on_step_start(step)
            for number, batch in enumerate(micro_batches, start=1):
                batch = batch.to(self._device, non_blocking=True)
                # Forward pass; some methods undo changes to the network only after the backward pass.
                with self._method.losses(batch, token_scale) as losses:
                    self._engine.backward(torch.stack(list(losses.values())).sum())
                for name, loss in losses.items():
                    totals[name] = totals.get(name, 0.0) + loss.detach()
                # Before the optimizer steps, and once: a repeated step has the same losses.
                if number == len(micro_batches) and attempt == 0:
                    verdict = self._check_losses(totals, len(micro_batches), step)
                self._callbacks.on_progress("optimizer step", step)
                # Accumulates gradients; after the last micro-batch also clips, masks, updates and zeroes them.
                grad_norm = self._engine.step(measure_norm=measure_norm, refuse=verdict.action != "accept")
            if verdict.action != "accept":
                break
        if verdict.action == "accept" and not self._engine.step_was_applied:
            verdict = self._guard.check_gradient(step)
        self._apply_decision(verdict)
        return grad_norm

    def _check_losses(self, totals: dict[str, torch.Tensor], num_micro_steps: int, step: int) -> Verdict:
        """Check the mean losses of a step, and count them in the logged means if they are accepted."""
        means = self._mean_losses(totals, num_micro_steps)
        verdict = self._guard.check_loss(sum(means.values()), step)
        if verdict.action == "accept":
            self._meter.add(means)
        return verdict

    def _apply_decision(self, verdict: Verdict) -> None:
        if verdict.action == "stop":
            raise TrainingError(verdict.message)
        if verdict.message is not None and self._is_main:
            logger.warning(verdict.message)
        if verdict.action == "rewind":
            raise RollbackError(verdict.message)

    def _mean_losses(self, totals: dict[str, torch.Tensor], num_micro_steps: int) -> dict[str, float]:
        """Means of named losses over micro-steps and ranks.

        The only host-device sync of a step, at a point where DeepSpeed's optimizer step would wait anyway.
        """
        values = all_reduce_sum(torch.stack(list(totals.values())))
        scale = num_micro_steps * self._world_size
        return dict(zip(totals, (values / scale).tolist(), strict=True))

    def _token_scale(self, micro_batches: list[Batch]) -> torch.Tensor:
        """Scalar that turns the mean over ranks and micro-steps of summed token losses into the loss per token.

        ranks * micro-steps / predicted tokens of the global batch, as DeepSpeed averages over ranks and micro-steps.
        """
        num_predicted = sum(batch.num_predicted for batch in micro_batches)
        # Filled on the device: a copy from the host would make every step wait for it.
        count = torch.full((), num_predicted, dtype=torch.float32, device=self._device)
        all_reduce_sum(count)
        return self._world_size * len(micro_batches) / count.clamp_min(1.0)

    def _log(
        self,
        progress: DomainProgress,
        step: int,
        losses: dict[str, float],
        learning_rate: float,
        grad_norm: torch.Tensor | float | None,
        rate: Rate,
    ) -> None:
        utilization = self._utilization.metrics(rate.tokens_per_s) if self._utilization is not None else {}
        # Those of the last step that was taken, which this one need not be.
        measured = {} if grad_norm is None else self._engine.group_norms
        group_norms = {group_norm(group): norm for group, norm in measured.items()}
        self._tracker.log(
            {
                DOMAIN: progress.domain,
                DOMAIN_STEP: step,
                TOKENS_SEEN: progress.tokens_seen + step * progress.tokens_per_step,
                # NaN where every step since the last line was skipped.
                LOSS: sum(losses.values()) if losses else math.nan,
                **{loss_part(name): value for name, value in losses.items()},
                LEARNING_RATE: learning_rate,
                GRAD_NORM: math.nan if grad_norm is None else float(grad_norm),
                **group_norms,
                SKIPPED_STEPS: self._engine.skipped_steps,
                TOKENS_PER_S: rate.tokens_per_s,
                **utilization,
                DATA_WAIT: rate.data_wait,
                PEAK_MEMORY_GIB: peak_memory_gib(),
                **self._callbacks.extra_metrics(),
            },
            global_step=progress.global_step + step,
        )
