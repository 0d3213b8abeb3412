"""What follows from the evaluations within a domain: the best step, early stopping, and limits on forgetting.

Every answer is a function of the recorded losses, so a run that resumes gives the same ones without further state.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from das_ds.checkpoint.manifest import DomainEnd, DomainEvaluation, EndReason, RunState
from das_ds.config import RunConfig
from das_ds.config.stage import Stage
from das_ds.errors import TrainingError
from das_ds.reporting.results import measured
from das_ds.training.data_module import loss_columns


@dataclass(frozen=True)
class _Limit:
    """The loss of one corpus above which a limit on forgetting is exceeded."""

    reference: float
    largest_rise: float
    since: str
    """When the reference was measured, in words."""
    key: str
    """Config key of `largest_rise`."""


class EvaluationPolicy:
    """When a run evaluates within domains, and what the losses decide.

    Args:
        config: of the run.
    """

    def __init__(self, config: RunConfig) -> None:
        self._evaluation = config.evaluation
        self._limits = config.faults.max_forgetting
        self._stages = config.stages
        self._general = None if config.general is None else config.general.name
        self._columns = loss_columns(config)
        self._readable = [domain.name for domain in config.readable_domains]

    @property
    def is_enabled(self) -> bool:
        """Whether there are evaluations within domains."""
        return self._evaluation.every_steps is not None

    @property
    def rolls_back(self) -> bool:
        """Whether a domain may end with the weights of the last step that kept the limits on forgetting."""
        return self._limits is not None and self._limits.action == "rollback"

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether there is an evaluation after so many steps of a domain of `num_steps`."""
        every_steps = self._evaluation.every_steps
        return every_steps is not None and step > 0 and (step % every_steps == 0 or step == num_steps)

    def corpora(self, stage: Stage) -> list[str]:
        """What is evaluated: the domains up to those of the stage, in the order of the run, then the general corpus."""
        domains = [domain for other in self._stages[: stage.index + 1] for domain in other.domains]
        domains = [domain for domain in domains if domain in self._readable]
        return domains + ([self._general] if self._general else [])

    def start(self, stage: Stage, state: RunState, row: Sequence[float | None]) -> DomainEvaluation:
        """The evaluation at step 0, which the loss matrix has already.

        Args:
            stage: that begins.
            state: of the run.
            row: of the loss matrix, of the model that the stage begins with.
        """
        losses = dict(zip(self._columns, row, strict=True))
        kept = {corpus: measured(losses[corpus]) for corpus in self.corpora(stage)}
        return DomainEvaluation(domain=stage.name, step=0, global_step=state.global_step, losses=kept)

    def exceeded(self, stage: Stage, state: RunState, at: DomainEvaluation) -> list[str]:
        """Each limit on forgetting that an evaluation exceeds, in words; [] where it keeps all.

        The general corpus is compared with the start of the domain, an earlier domain with the row of the loss matrix
        right after it was learned.
        """
        problems = []
        for corpus, limit in self._limits_of(stage, state).items():
            rise = at.losses[corpus] - limit.reference
            if rise > limit.largest_rise:
                problems.append(
                    f"{stage.name}, step {at.step}: loss of {corpus} is {rise:.4f} nats above that {limit.since}, "
                    f"allowed: {limit.largest_rise:g} ({limit.key})"
                )
        return problems

    def best_step(self, stage: Stage, state: RunState) -> int | None:
        """The first evaluated step with the lowest loss of the domain itself; None before the first.

        Where a limit on forgetting ends the domain, a step that exceeds one is never the best.
        """
        records = _steps_of(stage, state)
        if self._limits is not None and self._limits.action != "warn":
            records = [record for record in records if not self.exceeded(stage, state, record)]
        return min(records, key=lambda record: own_loss(stage, record)).step if records else None

    def last_step_within_limits(self, stage: Stage, state: RunState) -> int:
        """The last evaluated step that exceeds no limit on forgetting; 0 where all do."""
        records = _steps_of(stage, state)
        return max((record.step for record in records if not self.exceeded(stage, state, record)), default=0)

    def end_reason(self, stage: Stage, state: RunState) -> EndReason | None:
        """Why the domain ends at its latest evaluation; None: it goes on."""
        records = _steps_of(stage, state)
        if not records:
            return None
        is_limited = self._limits is not None and self._limits.action != "warn"
        if is_limited and self.exceeded(stage, state, records[-1]):
            return "max_forgetting"
        if records[-1].step == stage.num_steps:
            return "steps"
        return "early_stopping" if self._has_stalled([own_loss(stage, record) for record in records]) else None

    def end(self, stage: Stage, state: RunState) -> DomainEnd:
        """How a domain ended whose latest evaluation ended it."""
        reason = self.end_reason(stage, state)
        assert reason is not None, f"{stage.name} goes on"
        best_step = self.best_step(stage, state)
        last_step = _steps_of(stage, state)[-1].step
        model_step = last_step
        if self._evaluation.continue_from == "best" and best_step is not None:
            model_step = best_step
        elif reason == "max_forgetting" and self.rolls_back:
            model_step = self.last_step_within_limits(stage, state)
        return DomainEnd(domain=stage.name, reason=reason, step=last_step, best_step=best_step, model_step=model_step)

    def _limits_of(self, stage: Stage, state: RunState) -> dict[str, _Limit]:
        limits: dict[str, _Limit] = {}
        if self._limits is None:
            return limits
        if self._limits.earlier is not None:
            for other in self._stages[: stage.index]:
                row = state.loss_matrix[other.index + 1]
                for domain in filter(self._readable.__contains__, other.domains):
                    reference = measured(row[self._columns.index(domain)])
                    since = "right after it was learned"
                    limits[domain] = _Limit(reference, self._limits.earlier, since, "faults.max_forgetting.earlier")
        if self._limits.general is not None:
            assert self._general is not None, "a limit for the general corpus needs one"
            reference = _records_of(stage, state)[0].losses[self._general]
            since = "at the start of the domain"
            limits[self._general] = _Limit(reference, self._limits.general, since, "faults.max_forgetting.general")
        return limits

    def _has_stalled(self, losses: Sequence[float]) -> bool:
        """Whether the last `patience` losses did not improve on the lowest one before, each by `min_delta`."""
        stopping = self._evaluation.early_stopping
        if stopping is None:
            return False
        lowest = math.inf
        num_without = 0
        for loss in losses:
            if loss < lowest - stopping.min_delta:
                lowest = loss
                num_without = 0
            else:
                num_without += 1
        return num_without >= stopping.patience


def own_loss(stage: Stage, record: DomainEvaluation) -> float:
    """Held-out loss of the domain itself: in joint training the mean over its domains."""
    return statistics.fmean(record.losses[domain] for domain in stage.domains)


def check_finite(stage: Stage, step: int, losses: dict[str, float]) -> None:
    """Refuse losses of a model that has diverged.

    Raises:
        TrainingError: a loss is not finite.
    """
    for corpus, loss in losses.items():
        if not math.isfinite(loss):
            raise TrainingError(
                f"held-out loss of {corpus} at step {step} of {stage.name}: found {loss}, expected a finite number; "
                "lower train.learning_rate or train in fp32"
            )


def _records_of(stage: Stage, state: RunState) -> list[DomainEvaluation]:
    return [record for record in state.evaluations if record.domain == stage.name]


def _steps_of(stage: Stage, state: RunState) -> list[DomainEvaluation]:
    """Without the start of the domain."""
    return [record for record in _records_of(stage, state) if record.step > 0]
