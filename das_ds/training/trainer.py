"""Trainer of a run: trains on the domains in order, and evaluates, exports and reports after each of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy

from das_ds.checkpoint.manifest import Manifest, Phase, RunState
from das_ds.config import RunConfig
from das_ds.config.deepspeed import EngineConfig
from das_ds.config.stage import Stage
from das_ds.context import DomainContext
from das_ds.distributed.process_group import seed_everything
from das_ds.distributed.resumable import ResumableLoops
from das_ds.distributed.rng import RngState
from das_ds.distributed.state import Stateful
from das_ds.errors import ConfigError
from das_ds.methods import build_method, method_class
from das_ds.methods.base import Method
from das_ds.models.loading import get_weights_record
from das_ds.models.vocabulary import mean_init_rows, vocabulary_parameters
from das_ds.reporting.results import Results
from das_ds.training.base_divergence import BaseDivergence
from das_ds.training.callbacks import Callbacks, LoggedStep
from das_ds.training.console import RunConsole, RunSummary
from das_ds.training.continuation import Continuation
from das_ds.training.data_module import DataModule, loss_columns
from das_ds.training.domain_evaluation import DomainEvaluator
from das_ds.training.domain_samples import DomainSamples
from das_ds.training.domain_trainer import DomainProgress, DomainTrainer, RollbackError
from das_ds.training.earlier_run import EarlierRun
from das_ds.training.evaluate import evaluate_corpora
from das_ds.training.export import export_dtype
from das_ds.training.generated_text import GeneratedText
from das_ds.training.gradient_groups import gradient_groups
from das_ds.training.load_context import load_context
from das_ds.training.loss_guard import LossGuard
from das_ds.training.model_exports import ModelExports
from das_ds.training.publish import collect_results, plasticity_metrics, publish_results, write_plasticity
from das_ds.training.run_checkpoints import EngineDomainState, RunCheckpoints, current_stage
from das_ds.training.run_services import RunServices
from das_ds.training.run_summary import summarize_run
from das_ds.training.utilization import build_utilization

logger = logging.getLogger(__name__)

HEAD_WARMUP: Phase = "head_warmup"
"""Name in metrics of the steps that train a fresh LM head alone."""
BEFORE_SEED = 0
AFTER_SEED = 2
STEP_SEEDS = {"train": 1, HEAD_WARMUP: 3}
"""Phase of optimizer steps -> number in the seed of its generators; those before and after a domain have others."""


class ContinualTrainer(Callbacks):
    """The phases of a run over one engine: evaluate -> before -> train -> after, for every domain.

    A run resumes at the phase of its checkpoint. As `Callbacks` of the loops inside a phase the trainer saves, stops,
    and reports its progress to the watchdog.

    Args:
        config: of the run.
        services: of the run.
        data: tokenizers and batches.
        engine_config: DeepSpeed's merged settings.
        earlier: the run that it continues; None: none, or the run has begun with its own domains.

    Raises:
        ConfigError: the run cannot be continued, or has settings that do not fit the network.
    """

    prints_progress = True
    """Whether rank 0 prints what happens."""

    def __init__(
        self,
        config: RunConfig,
        services: RunServices,
        data: DataModule,
        engine_config: EngineConfig,
        earlier: EarlierRun | None = None,
    ) -> None:
        self._config = config
        self._services = services
        self._ranks = services.process_group
        self._watchdog = services.watchdog
        self._data = data
        self._stages = config.stages
        self._columns = loss_columns(config)
        self._start_time = time.monotonic()
        self._earlier_seconds = 0.0
        # Before the model is built, so that an unsupported export dtype fails in the first second.
        export_dtype(config)
        self.context = load_context(config, data, engine_config, self._ranks)
        self._network = self.context.network
        self._model = self._network.model
        self.engine = self.context.engine
        if config.train.log_group_norms:
            self.engine.measure_groups(gradient_groups(self.context.layout, self.context.lora))
        self._state = self._initial_state()
        # In host memory, and only for methods that train every domain from the base model.
        self._base = self.engine.weights.snapshot() if method_class(config.method).starts_from_base else None
        self._method = build_method(self.context)
        self._continuation: Continuation | None = None
        if earlier is not None:
            has_base = self._state.phase != HEAD_WARMUP
            if self._base is not None and not has_base:
                raise ConfigError(
                    f"continue_from: found method {config.method.name}, which trains every domain from the base model, "
                    "with model.head_warmup_steps, whose result is not kept; expected another method, or a new run "
                    "over all domains"
                )
            reset = self._reset_new_tokens
            self._continuation = Continuation(
                config, earlier, self.context, self._method, data, reset, has_base=has_base
            )
        self._generated = GeneratedText(config, self.context, data, services)
        # Rewinds are counted over the run, so one guard serves all domains.
        self._guard = LossGuard(config.faults)
        self._loops = self._build_loops()
        self._utilization = build_utilization(config, self.context, data) if self._ranks.info.is_main else None
        self._progress: DomainProgress | None = None
        every_steps = config.evaluation.every_steps
        self._console = RunConsole(
            config.stages, is_main=self._ranks.info.is_main and self.prints_progress, every_steps=every_steps
        )
        self._exports = ModelExports(config, self.context, services, data, self._console)
        self._evaluator = DomainEvaluator(
            config, self.context, services, data, self._loops, self._console, self._exports
        )
        self._divergence = (
            BaseDivergence(self.context, data, self._loops) if config.evaluation.base_divergence else None
        )
        components: dict[str, Stateful] = {
            # First, so that changed text is reported before anything is restored.
            "data": data,
            "engine": self.engine,
            "method": self._method,
            "loops": self._loops,
            "loss_guard": self._guard,
            **({"streams": data.stream_positions} if data.stream_positions is not None else {}),
            **({"base_divergence": self._divergence} if self._divergence is not None else {}),
        }
        if any(config.replays_generated(domain.name) for domain in config.domains):
            components["generated_text"] = self._generated
        # Last: it makes process groups, which all ranks have to do in the same order.
        self._checkpoints = RunCheckpoints(config, services, self.engine, components)
        self._save_point = self._checkpoints.save_point

    def _build_loops(self) -> ResumableLoops:
        """Loops over batches, between two of which the run may be saved or stopped."""
        info = self._ranks.info
        return ResumableLoops(self.on_batch_end, show_progress=info.is_main, device=info.device)

    def _initial_state(self) -> RunState:
        """Start with the head warm-up if the LM head was initialized at random and the config asks for it."""
        record = get_weights_record(self._model)
        # Weights that no file held and that were initialized at random.
        drawn = [] if record is None else record["drawn"]
        warms_up = bool(drawn) and self._config.model.head_warmup_steps > 0
        if self._config.model.head_warmup_steps and not warms_up and self._ranks.info.is_main:
            logger.warning("model.head_warmup_steps: the files hold the LM head, which is used as it is")
        # The loss of masked tokens, given all others, is no code length of the text.
        tokens_per_byte = self._data.tokens_per_byte() if self.context.objective == "clm" else None
        phase: Phase = HEAD_WARMUP if warms_up else "evaluate"
        return RunState(phase=phase, weights=record, tokens_per_byte=tokens_per_byte)

    def run(self, manifest: Manifest | None) -> Results:
        """Run all remaining phases.

        Args:
            manifest: of the checkpoint to resume from; None: start from the beginning.
        """
        phases = {
            HEAD_WARMUP: self._warm_up_head,
            "evaluate": self._evaluate,
            "before": self._before_domain,
            "train": self._train_domain,
            "after": self._after_domain,
        }
        if manifest is not None:
            self._earlier_seconds = manifest.run.wall_seconds
            with self._watchdog.suspend_timeout("reading a checkpoint"):
                self._state = self._checkpoints.load(manifest)
        elif self._continuation is not None:
            self._earlier_seconds = self._continuation.wall_seconds
            self._state = self._continuation.start(self._state)
        else:
            with self._watchdog.suspend_timeout("reading files of the method"):
                self._method.on_run_start()
            if self._state.phase == HEAD_WARMUP:
                # Steps come after a checkpoint, to which a rollback could return.
                self._save_point.save(self._state)
        # Lines logged after the checkpoint would appear twice.
        self._checkpoints.truncate_metrics(self._state, manifest)
        self._console.run_started(self._summary(manifest))
        while self._state.phase != "finished":
            stage = current_stage(self._stages, self._state)
            self._watchdog.set_phase(f"{stage.name}, {self._state.phase}")
            phase = self._state.phase
            phase_start = time.monotonic()
            try:
                phases[phase]()
            except RollbackError:
                self._rollback()
            else:
                self._console.phase_ended(phase, time.monotonic() - phase_start)
        self._save_point.wait()
        return self._results()

    def _rollback(self) -> None:
        """Return to the latest checkpoint; the loss guard remembers which step to skip."""
        manifest = self._checkpoints.find_rollback_target()
        self._loops.reset()
        self._state = self._checkpoints.load(manifest)
        self._checkpoints.truncate_metrics(self._state, manifest)

    # Phases, in the order in which they run for a domain.

    def _warm_up_head(self) -> None:
        """Train the LM head alone on text of the first stage, which then begins with the same text."""
        model = self._config.model
        stage = replace(self._stage, num_steps=model.head_warmup_steps)
        # Parameter names of the network below the head begin with its attribute name, such as `roberta.`.
        body = f"{self._model.base_model_prefix}."
        head = {name for name in self.engine.parameters if not name.startswith(body)}
        with self._network.training_head_only(), self.engine.training_only(head):
            train = self._config.train.model_copy(update={"learning_rate": model.head_warmup_learning_rate})
            self._run_steps(stage, HEAD_WARMUP, Method(self.context), train=train)
        self._enter(self._state.model_copy(update={"phase": "evaluate", "domain_step": 0}))

    def _evaluate(self) -> None:
        """Evaluate all corpora and publish the results so far."""
        history = self._continuation
        if history is not None and history.is_at_history(self._state):
            found = history.evaluate(self._state, self._loops)
            if not history.is_at_end(self._state):
                matrix = [*self._state.loss_matrix, self._row(found)]
                known = {"loss_matrix": matrix, "base_divergences": self._measure_divergence()}
                with self._watchdog.suspend_timeout("reading a checkpoint of the earlier run"):
                    self._state = history.load_next(self._state).model_copy(update=known)
                self._enter(self._state, save=False)
                return
            losses = {corpus: loss for corpus in self._columns if (loss := found.get(corpus)) is not None}
        else:
            losses = evaluate_corpora(self._network, self._data, self._loops)
        is_last = self._state.domains_done == len(self._stages)
        state = self._state.model_copy(
            update={
                "loss_matrix": [*self._state.loss_matrix, self._row(losses)],
                "base_divergences": self._measure_divergence(),
                "phase": "finished" if is_last else "before",
            }
        )
        # Published before the checkpoint: a run that dies in between publishes the same results again.
        self._state = self._with_wall_time(state)
        with self._watchdog.suspend_timeout("writing results"):
            self._ranks.run_on_main(lambda: self._publish(losses))
        before = dict(zip(self._columns, self._state.loss_matrix[-2], strict=True)) if self._state.domains_done else {}
        self._console.evaluated(losses, before, self._state.domains_done)
        self._enter(self._state)

    def _measure_divergence(self) -> list[float | None]:
        """The divergences from the base so far, which is kept before training; None: a model or its text is gone."""
        if self._divergence is None:
            return []
        num_learned = self._state.domains_done
        has_model = self._continuation is None or self._continuation.has_model(self._state)
        if num_learned == 0:
            if has_model:
                self._divergence.keep_base()
            return []
        stage = self._stages[num_learned - 1]
        divergence = self._divergence.measure(stage) if has_model else None
        if divergence is not None:
            self._console.divergence_measured(stage.name, divergence)
        return [*self._state.base_divergences, divergence]

    def _row(self, losses: Mapping[str, float | None]) -> list[float | None]:
        """Losses by corpus as a row of the loss matrix."""
        return [losses.get(corpus) for corpus in self._columns]

    def _before_domain(self) -> None:
        """Let the method prepare the domain, for example measure importance."""
        if self._base is not None:
            self.engine.weights.restore(self._base)
        self._network.num_rows = self._data.num_rows(self._stage.last_domain)
        self._prepare_text(self._stage)
        self._generated.before_domain(self._stage, self._loops)
        self._seed(BEFORE_SEED)
        self._method.before_domain(self._domain_context())
        self._report_plasticity()
        # A phase that measured nothing is repeated in no time, so it needs no checkpoint.
        self._enter(self._state.model_copy(update={"phase": "train"}), save=self._loops.num_batches > 0)

    def _train_domain(self) -> None:
        """Run the optimizer steps of the domain."""
        stage = self._stage
        # Trained from the base model, a domain is the first and the last of its learning-rate schedule.
        is_alone = self._base is not None
        self._run_steps(
            stage,
            stage.name,
            self._method,
            train=self._config.train_settings(stage.last_domain),
            is_first=is_alone or stage.index == 0,
            is_last=is_alone or stage.index == len(self._stages) - 1,
        )
        with self._watchdog.suspend_timeout("exporting"):
            self._state = self._evaluator.finish(stage, self._state)
        self._generated.clear()
        self._enter(self._state.model_copy(update={"phase": "after"}))

    def _after_domain(self) -> None:
        """Let the method finish the domain, then export the model."""
        stage = self._stage
        self._network.num_rows = self._data.num_rows(stage.last_domain)
        self._seed(AFTER_SEED)
        self._method.after_domain(self._domain_context())
        self._report_plasticity()
        with self._watchdog.suspend_timeout("exporting"):
            self._reset_new_tokens(stage.last_domain)
            self._exports.export(stage, self._state)
        domains_done = self._state.domains_done + 1
        self._enter(
            self._state.model_copy(update={"phase": "evaluate", "domains_done": domains_done, "domain_step": 0})
        )

    def _enter(self, state: RunState, *, save: bool = True) -> None:
        """End the current phase and enter that of `state`.

        Args:
            state: progress of the run.
            save: whether to save a checkpoint without a request.
        """
        self._loops.reset()
        self._checkpoints.close_reader()
        self._state = state = state.model_copy(update={"within_phase": False})
        earlier_steps = 0 if self._continuation is None else self._continuation.global_step
        if state.phase == "finished" or (state.phase != "evaluate" and state.global_step == earlier_steps):
            # Saved before the first metric is logged: metrics without a checkpoint mean that checkpoints were deleted.
            self._save_point.wait()
            self._save_point.save(state)
        else:
            self._check_save_point(save=save)

    def _run_steps(self, stage: Stage, name: str, method: Method[Any], **schedule: Any) -> None:
        """Run the remaining optimizer steps of the current phase.

        Args:
            stage: its text and number of steps.
            name: for metrics.
            method: whose losses are trained on.
            schedule: for `Engine.start_domain`.
        """
        first_step = self._state.domain_step
        tokens_per_step = self._config.train.global_batch_size * self._config.data.sequence_length
        progress = DomainProgress(
            domain=name,
            global_step=self._state.global_step - first_step,
            tokens_seen=self._state.tokens_seen - first_step * tokens_per_step,
            tokens_per_step=tokens_per_step,
            num_steps=stage.num_steps,
            evaluate_every=self._config.evaluation.every_steps if self._state.phase == "train" else None,
        )
        self._progress = progress
        # Logits cover only the tokens that this domain knows.
        self._network.num_rows = self._data.num_rows(stage.last_domain)
        trainer = DomainTrainer(
            self.engine,
            method,
            self._services.tracker,
            self._config.train,
            guard=self._guard,
            callbacks=self,
            utilization=self._utilization,
        )
        # Resets schedule and moments; `load_step_components` restores them when the run resumes within the domain, but
        # moments that outlive a domain, which are restored with the weights.
        keeps_moments = not self._config.train.reset_optimizer and (first_step > 0 or stage.index > 0)
        self.engine.start_domain(stage.num_steps, keeps_moments=keeps_moments, **schedule)
        method.on_train_start(self._domain_context())
        if keeps_moments and first_step == 0:
            self.engine.mask_first_moments()
        self._seed(STEP_SEEDS[self._state.phase])
        self._checkpoints.step_components = {
            "engine_domain": EngineDomainState(self.engine),
            "domain_trainer": trainer,
            **({"kept_weights": self._evaluator.kept} if self._evaluator.policy.is_enabled else {}),
            # Last: nothing may draw random numbers between their restoration and the first step.
            "rng": RngState(),
        }
        try:
            if first_step == 0:
                self._guard.start_domain(name)
                self._start_evaluations(stage)
            else:
                self._checkpoints.load_step_components()
            # A run that was stopped within an evaluation finishes it first.
            if not self._evaluate_within():
                self._prepare_text(stage, first_step)
                # Closed at once, also after an error: a process may read ahead for them.
                with closing(self._data.training_steps(stage, first_step, generated=self._generated.source)) as steps:
                    self._state = self._state_after(trainer.run(steps, progress, first_step=first_step))
                self._evaluate_within()
        finally:
            # Also after a rollback or stop: later phases must not save the state of these steps.
            self._checkpoints.step_components = {}

    def _prepare_text(self, stage: Stage, first_step: int = 0) -> None:
        """Tokenize the first of what is streamed, which may take minutes."""
        with self._watchdog.suspend_timeout("tokenizing a stream"):
            self._data.require_windows(stage, first_step, generated=self._generated.source)

    def _start_evaluations(self, stage: Stage) -> None:
        if self._state.phase == "train":
            row = self._state.loss_matrix[-1 if self._base is None else 0]
            self._state = self._evaluator.start(stage, self._state, row)

    def _evaluate_within(self) -> bool:
        """Evaluate after this step of the domain, if that is due; whether the domain ends here."""
        if self._state.phase != "train" or not self._evaluator.policy.is_enabled:
            return False
        self._state = self._evaluator.evaluate(self._stage, self._state)
        return self._evaluator.policy.end_reason(self._stage, self._state) is not None

    def _state_after(self, step: int) -> RunState:
        """Progress of the run after so many optimizer steps of the current phase."""
        assert self._progress is not None, "steps are running"
        update = {
            "domain_step": step,
            "global_step": self._progress.global_step + step,
            "tokens_seen": self._progress.tokens_seen + step * self._progress.tokens_per_step,
        }
        return self._state.model_copy(update=update)

    # Callbacks of the loops inside a phase.

    def on_progress(self, location: str, step: int) -> None:
        """Report progress to the watchdog."""
        self._watchdog.beat(location, step)

    def on_step_end(self, step: int) -> bool:
        """Evaluate, save or stop after an optimizer step, if that is due; whether the domain ends there."""
        self._state = self._state_after(step)
        # The end of a domain is saved with the next phase.
        if self._evaluate_within():
            return True
        self._check_save_point(save=step % self._config.checkpoint.interval == 0)
        return False

    def on_step_logged(self, logged: LoggedStep) -> str:
        """Print the step, or show it behind the progress bar."""
        return self._console.step_logged(logged, self._state)

    def on_batch_end(self) -> None:
        """Save or stop after a batch of an importance pass or an evaluation, if that is due."""
        num_batches = self._loops.num_batches
        self._watchdog.beat(f"a batch of phase {self._state.phase}", num_batches)
        self._state = self._state.model_copy(update={"within_phase": True})
        self._check_save_point(save=num_batches % self._config.checkpoint.interval == 0)

    def extra_metrics(self) -> dict[str, float]:
        """Costs of the checkpoints saved since the last logged line, and what earlier domains leave free to learn.

        The latter is in every line of a domain, so that it does not matter where a run was stopped.
        """
        metrics = self._save_point.pop_metrics()
        measured = self._method.plasticity() if self._state.phase == "train" else None
        return metrics if measured is None else metrics | plasticity_metrics(measured.before)

    def _check_save_point(self, *, save: bool) -> None:
        self._save_point.check(self._with_wall_time(self._state), save=save)

    # The phases.

    @property
    def _stage(self) -> Stage:
        return self._stages[self._state.domains_done]

    def _domain_context(self) -> DomainContext:
        stage = self._stage
        samples = DomainSamples(self._data, self._loops, stage, self._generated.source)
        return DomainContext(
            index=stage.index,
            name=stage.name,
            sample_batches=samples.batches,
            sample_steps=samples.steps,
            run_folder=self._services.run_dir.root,
            folder=self._services.run_dir.domain(stage.index, stage.name),
            suspend_timeout=self._watchdog.suspend_timeout,
            num_tokens=self._data.num_tokens(stage.last_domain),
            general=samples.general,
            generated=samples.generated,
            probe_batches=samples.probe,
        )

    def _report_plasticity(self) -> None:
        """Print and write what the method's last hook measured of the capacity left; a collective."""
        measured = self._method.plasticity()
        if measured is None:
            return
        folder = self._services.run_dir.domain(self._stage.index, self._stage.name)
        self._ranks.run_on_main(lambda: write_plasticity(folder, measured))
        self._console.plasticity_measured(measured)

    def _publish(self, losses: dict[str, float]) -> None:
        publish_results(
            self._results(),
            self._services.run_dir,
            self._services.tracker,
            losses,
            self._state,
            self._method.accumulated_importance(),
        )
        if self._state.domains_done:
            self._exports.write_losses(self._stages[self._state.domains_done - 1], self._state, losses)
            # Once its card is complete.
            self._services.uploads.add(self._state.domains_done)

    def _results(self) -> Results:
        return collect_results(self._config, self._state, self._ranks.info.world_size, self.engine.zero_stage)

    def _reset_new_tokens(self, learned: str) -> None:
        """Reset embeddings of tokens that later domains add to the mean of all known tokens, discarding any updates."""
        if (vocabulary := self._data.vocabulary) is not None:
            known = vocabulary.num_tokens[learned]
            names = vocabulary_parameters(self._model)
            self.engine.weights.map_weights(names, lambda weight: mean_init_rows(weight, known, vocabulary.total))

    def _summary(self, manifest: Manifest | None) -> RunSummary:
        resumes = None if manifest is None else f"{manifest.name}: {self._checkpoints.describe(self._state)}"
        return summarize_run(self._config, self.context, self._data, resumes)

    def _with_wall_time(self, state: RunState) -> RunState:
        seconds = self._earlier_seconds + time.monotonic() - self._start_time
        return state.model_copy(update={"wall_seconds": seconds})

    def _seed(self, phase_seed: int) -> None:
        """Seed all generators from the run's seed and progress.

        Seeding at fixed points makes a run that was stopped between domains equal to one that was not.
        """
        entropy = [self._config.seed, self._state.domains_done, phase_seed, self._ranks.info.rank]
        if self._state.domain_step:
            # Resuming with a different world size changes the dropout masks; with the same one the generators' saved
            # states replace this seed.
            entropy.append(self._state.domain_step)
        seed_everything(int(numpy.random.SeedSequence(entropy).generate_state(1)[0]))
