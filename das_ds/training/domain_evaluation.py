"""Evaluation within a domain, and what a run does about it: the best model, early stopping, limits on forgetting."""

from __future__ import annotations

import logging
import time

from das_ds.checkpoint.manifest import DomainEnd, DomainEvaluation, RunState
from das_ds.config import RunConfig
from das_ds.config.stage import Stage
from das_ds.context import RunContext
from das_ds.distributed.resumable import ResumableLoops
from das_ds.functional.losses import bits_per_byte
from das_ds.tracking.names import DOMAIN, DOMAIN_STEP, eval_bits_per_byte, eval_loss
from das_ds.tracking.sinks import Scalar
from das_ds.training.console import WITHIN, RunConsole
from das_ds.training.data_module import DataModule
from das_ds.training.evaluate import evaluate_corpora
from das_ds.training.evaluation_policy import EvaluationPolicy, check_finite
from das_ds.training.kept_weights import KeptWeights
from das_ds.training.model_exports import ModelExports
from das_ds.training.run_services import RunServices

logger = logging.getLogger(__name__)


class DomainEvaluator:
    """Evaluates the model within domains, every method on all ranks; training goes on bit for bit as without it.

    An evaluation changes neither weights nor random generators, and reads the held-out text by itself. What it leaves
    are a record in the state of the run, a line in the metrics, and copies of weights.

    Args:
        config: of the run.
        context: network and engine.
        services: of the run.
        data: held-out text.
        loops: over its batches, which continue where a checkpoint was saved.
        console: prints losses.
        exports: of the run.
    """

    def __init__(
        self,
        config: RunConfig,
        context: RunContext,
        services: RunServices,
        data: DataModule,
        loops: ResumableLoops,
        console: RunConsole,
        exports: ModelExports,
    ) -> None:
        self._settings = config.evaluation
        self._context = context
        self._services = services
        self._data = data
        self._loops = loops
        self._console = console
        self._exports = exports
        self.policy = EvaluationPolicy(config)
        self.kept = KeptWeights(context.engine.weights)
        """A component of checkpoints within a domain."""

    def start(self, stage: Stage, state: RunState, row: list[float | None]) -> RunState:
        """Begin a domain.

        Args:
            stage: that begins.
            state: of the run.
            row: of the loss matrix, of the model that the stage begins with.

        Returns:
            The state with the evaluation at step 0, where there are evaluations within domains.
        """
        if not self.policy.is_enabled:
            return state
        self.kept.clear()
        if self.policy.rolls_back:
            self.kept.keep("within_limits")
        return self._record(state, self.policy.start(stage, state, row))

    def evaluate(self, stage: Stage, state: RunState) -> RunState:
        """Evaluate, if that is due at this step and not done yet.

        Returns:
            The state with the evaluation.

        Raises:
            TrainingError: a loss is not finite.
        """
        step = state.domain_step
        if not self.policy.is_due(step, stage.num_steps) or state.evaluations[-1].global_step == state.global_step:
            return state
        start = time.monotonic()
        losses = evaluate_corpora(self._context.network, self._data, self._loops, self.policy.corpora(stage))
        check_finite(stage, step, losses)
        self._loops.reset()
        # Evaluation left the vocabulary of the last corpus, and ZeRO-3 weights that only training releases.
        self._context.network.num_rows = self._data.num_rows(stage.last_domain)
        self._context.engine.weights.release_gathered()
        record = DomainEvaluation(domain=stage.name, step=step, global_step=state.global_step, losses=losses)
        self._console.evaluated_within(record, before=state.evaluations[-1])
        self._console.phase_ended(WITHIN, time.monotonic() - start)
        state = self._record(state, record)
        self._keep(stage, state)
        return state

    def finish(self, stage: Stage, state: RunState) -> RunState:
        """After the last step: export the model that the run does not go on with, if one is kept, and choose the other.

        Returns:
            The state with the end of the domain.
        """
        if not self.policy.is_enabled:
            return state
        end = self.policy.end(stage, state)
        if self._settings.keep_best and end.best_step is not None:
            self._export_other(stage, end)
        if end.model_step != end.step:
            self.kept.restore("best" if self._continues_from_best(end) else "within_limits")
        self.kept.clear()
        self._console.domain_ended(end)
        return state.model_copy(update={"ends": [*state.ends, end]})

    def _record(self, state: RunState, record: DomainEvaluation) -> RunState:
        metrics: dict[str, Scalar] = {DOMAIN: record.domain, DOMAIN_STEP: record.step}
        metrics |= {eval_loss(corpus): loss for corpus, loss in record.losses.items()}
        for corpus, ratio in (state.tokens_per_byte or {}).items():
            if corpus in record.losses:
                metrics[eval_bits_per_byte(corpus)] = bits_per_byte(record.losses[corpus], ratio)
        self._services.tracker.log_domain_evaluation(metrics, global_step=record.global_step)
        return state.model_copy(update={"evaluations": [*state.evaluations, record]})

    def _keep(self, stage: Stage, state: RunState) -> None:
        """Copy the weights that the domain may end with, and warn of exceeded limits."""
        record = state.evaluations[-1]
        exceeded = self.policy.exceeded(stage, state, record)
        if self._services.process_group.info.is_main:
            for problem in exceeded:
                logger.warning(problem)
        if self._settings.selects_best and self.policy.best_step(stage, state) == record.step:
            self.kept.keep("best")
        if self.policy.rolls_back and not exceeded:
            self.kept.keep("within_limits")

    def _export_other(self, stage: Stage, end: DomainEnd) -> None:
        if self._settings.continue_from == "best":
            self._exports.export_other(stage, "last", end.step)
            return
        assert end.best_step is not None, "there is a best step"
        if end.best_step == end.step:
            self._exports.export_other(stage, "best", end.step)
            return
        weights = self._context.engine.weights
        present = weights.snapshot()
        self.kept.restore("best")
        self._exports.export_other(stage, "best", end.best_step)
        weights.restore(present)

    def _continues_from_best(self, end: DomainEnd) -> bool:
        return self._settings.continue_from == "best" and end.best_step is not None
