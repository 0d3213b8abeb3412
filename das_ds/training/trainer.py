"""A whole run: domains in order, with evaluation before the first and after each, export, results and report."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

import numpy

from das_ds.checkpoint.manifest import Manifest, Phase, RunState
from das_ds.checkpoint.reader import CheckpointReader
from das_ds.checkpoint.saver import AsyncCheckpointer
from das_ds.checkpoint.store import CheckpointStore, find_latest_valid
from das_ds.config import RunConfig
from das_ds.config.deepspeed import EngineConfig
from das_ds.config.stage import Stage
from das_ds.context import DomainContext, build_context
from das_ds.distributed.process_group import ProcessGroup, seed_everything
from das_ds.distributed.resumable import ResumableLoop, ResumableLoops
from das_ds.distributed.rng import get_rng_state, set_rng_state
from das_ds.distributed.state import ComponentState
from das_ds.engine.sharded_init import sharded_init
from das_ds.fault_tolerance.shutdown import ShutdownHandler
from das_ds.fault_tolerance.watchdog import Watchdog
from das_ds.functional.token_ids import num_tokens
from das_ds.methods import build_method, method_class
from das_ds.methods.base import Method
from das_ds.models.loading import check_sequence_length, get_weights_record, load_model, print_weights_summary
from das_ds.models.vocabulary import mean_init_rows, reserve_embedding_rows, vocabulary_parameters
from das_ds.reporting.results import Results
from das_ds.run_dir import METRICS_FILE, RunDir
from das_ds.tracking.tracker import Tracker
from das_ds.tracking.wandb_sink import stored_run_id
from das_ds.training.data_module import DataModule
from das_ds.training.domain_trainer import DomainTrainer, Progress, RollbackError
from das_ds.training.evaluate import evaluate_corpora
from das_ds.training.export import export_dtype, export_model, model_card
from das_ds.training.loss_guard import LossGuard, LossGuardState
from das_ds.training.publish import collect_results, publish_results
from das_ds.training.save_point import Parts, SavePoint
from das_ds.versions import library_versions

logger = logging.getLogger(__name__)

ENGINE, METHOD, GENERATORS, PASSES, TRAINER, GUARD = "engine", "method", "generators", "passes", "trainer", "guard"
TEXT = "text"
"""Parts of a checkpoint."""
HEAD_WARMUP: Phase = "head_warmup"
"""Name in metrics of the steps that train a fresh LM head alone."""
SEEDED = {"train": 1, HEAD_WARMUP: 3}
"""Phase of optimizer steps -> what its generators are seeded with, beside 0 and 2 before and after a domain."""


class ContinualTrainer:
    """The phases of a run over one engine, each of which can be entered from a checkpoint.

    Args:
        config, ranks, folder, text, tracker, engine_config: of the run.
        store: its checkpoints.
        requests: what this rank is asked for.
        watchdog: is told where this rank stands.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: ProcessGroup,
        folder: RunDir,
        text: DataModule,
        tracker: Tracker,
        engine_config: EngineConfig,
        store: CheckpointStore,
        requests: ShutdownHandler,
        watchdog: Watchdog,
    ) -> None:
        self._config, self._ranks, self._folder, self._text, self._tracker = config, ranks, folder, text, tracker
        self._store, self._watchdog, self._state, self._stages = store, watchdog, RunState(), config.stages
        self._began, self._earlier_seconds = time.monotonic(), 0.0
        self._export_dtype = export_dtype(config)
        # Parameters that are born as shards cannot be given more rows.
        construction = sharded_init(engine_config, ranks) if text.vocabulary is None else None
        vocab_size = num_tokens(text.base_tokenizer.get_vocab())
        self._model, spec = load_model(config.model, seed=config.seed, vocab_size=vocab_size, construction=construction)
        if ranks.info.is_main:
            print_weights_summary(self._model)
        check_sequence_length(self._model, spec, config.data.sequence_length)
        if text.vocabulary is not None:
            reserve_embedding_rows(self._model, text.vocabulary.base_tokens, text.vocabulary.total)
        exact = construction.take_exact_weights() if construction else None
        context = build_context(config, self._model, spec, engine_config, ranks, exact=exact, tokens=text.all_tokens)
        self.engine, self._lora, self._network = context.engine, context.lora, context.network
        self._objective = context.objective
        self._context = context
        self._state = self._first_state()
        self._base = self.engine.weights.snapshot() if method_class(config.method).starts_from_base else None
        self._method: Method[Any] = build_method(context)
        self._guard = LossGuard(config.faults)
        self._trainer: DomainTrainer | None = None
        self._passes = ResumableLoops(self._between_batches, show=ranks.info.is_main)
        about = {
            "world_size": ranks.info.world_size,
            "zero_stage": self.engine.zero_stage,
            "versions": library_versions(),
        }
        saver = AsyncCheckpointer(
            ranks,
            store,
            self.engine.weights.checkpoint_shards(),
            about,
            asynchronous=config.checkpoint.async_save,
            beside=[folder.root / METRICS_FILE],
        )
        self.engine.on_weights_will_change = saver.wait_for_copy
        self._boundary = SavePoint(ranks, saver, requests, watchdog, self._save_arguments, lambda: tracker.failure)
        self._opened: CheckpointReader | None = None

    def run(self, manifest: Manifest | None) -> Results:
        """Everything that is still to be done.

        Args:
            manifest: of the checkpoint to continue from; None: from the beginning.
        """
        phases = {
            HEAD_WARMUP: self._warm_up_head,
            "evaluate": self._evaluate,
            "before": self._before,
            "train": self._train,
            "after": self._after,
        }
        if manifest is not None:
            self._earlier_seconds = manifest.run.wall_seconds
            with self._watchdog.suspend_timeout("reading a checkpoint"):
                self._load(manifest)
        elif self._state.phase == HEAD_WARMUP:
            # Steps come after a checkpoint.
            self._boundary.save(self._state, self._parts())
        self._truncate_metrics(manifest)
        while self._state.phase != "finished":
            self._watchdog.set_phase(f"{self._domain_name(self._state)}, {self._state.phase}")
            try:
                phases[self._state.phase]()
            except RollbackError:
                self._rollback()
        self._boundary.settle()
        return self._results()

    def _evaluate(self) -> None:
        row = evaluate_corpora(self._network, self._text, self._passes)
        is_last = self._state.domains_done == len(self._stages)
        state = self._state.model_copy(
            update={
                "loss_matrix": [*self._state.loss_matrix, list(row.values())],
                "phase": "finished" if is_last else "before",
            }
        )
        self._state = self._timed(state)
        with self._watchdog.suspend_timeout("writing results"):
            self._ranks.run_on_main(lambda: self._publish(row))
        self._enter(self._state)

    def _publish(self, row: dict[str, float]) -> None:
        importance = self._method.accumulated_importance()
        publish_results(self._results(), self._folder.root, self._tracker, row, self._state, importance)

    def _results(self) -> Results:
        return collect_results(self._config, self._state, self._ranks.info.world_size, self.engine.zero_stage)

    def _before(self) -> None:
        if self._base is not None:
            self.engine.weights.restore(self._base)
        self._network.num_rows = self._text.num_rows(self._stage.last_domain)
        self._seed(0)
        self._method.before_domain(self._domain)
        # Without a pass nothing was done that could not be done again at once.
        self._enter(self._state.model_copy(update={"phase": "train"}), save=self._passes.num_batches > 0)

    def _first_state(self) -> RunState:
        record = get_weights_record(self._model)
        drawn = [] if record is None else record["drawn"]
        is_warmed = bool(drawn) and self._config.model.head_warmup_steps > 0
        if self._config.model.head_warmup_steps and not is_warmed and self._ranks.info.is_main:
            logger.warning("model.head_warmup_steps: the files hold the LM head, which is used as it is")
        return RunState(phase=HEAD_WARMUP if is_warmed else "evaluate", weights=record)

    def _warm_up_head(self) -> None:
        """Train the LM head alone on text of the first stage, which then begins with the same text."""
        model = self._config.model
        stage = replace(self._stage, num_steps=model.head_warmup_steps)
        body = f"{self._model.base_model_prefix}."
        head = {name for name in self.engine.parameters if not name.startswith(body)}
        with self._network.training_head_only(), self.engine.training_only(head):
            rate = model.head_warmup_learning_rate
            end = self._take_steps(HEAD_WARMUP, stage, HEAD_WARMUP, Method(self._context), learning_rate=rate)
        self._enter(end.model_copy(update={"phase": "evaluate", "domain_step": 0}))

    def _train(self) -> None:
        stage, is_alone = self._stage, self._base is not None
        end = self._take_steps(
            "train",
            stage,
            stage.name,
            self._method,
            is_first=is_alone or stage.index == 0,
            is_last=is_alone or stage.index == len(self._stages) - 1,
        )
        self._enter(end.model_copy(update={"phase": "after"}))

    def _take_steps(self, phase: Phase, stage: Stage, name: str, method: Method[Any], **schedule: Any) -> RunState:
        """All optimizer steps of a phase, or those still to be done; the state after the last.

        Args:
            phase: the present one.
            stage: its text and number of steps.
            name: for metrics.
            method: whose losses are trained on.
            schedule: for `Engine.start_domain`.
        """
        train = self._config.train
        begin, first_step = self._state, self._state.domain_step
        self._network.num_rows = self._text.num_rows(stage.last_domain)
        tokens_per_step = train.global_batch_size * self._config.data.sequence_length
        progress = Progress(
            name,
            begin.global_step - first_step,
            begin.tokens_seen - first_step * tokens_per_step,
            tokens_per_step,
            stage.num_steps,
        )

        def at(step: int) -> RunState:
            update = {
                "phase": phase,
                "domain_step": step,
                "global_step": progress.global_step + step,
                "tokens_seen": progress.tokens_seen + step * tokens_per_step,
            }
            return begin.model_copy(update=update)

        def after_step(step: int) -> None:
            self._state = at(step)
            self._pass_boundary(save=step % self._config.checkpoint.interval == 0)

        trainer = self._trainer = DomainTrainer(
            self.engine,
            method,
            self._tracker,
            train,
            guard=self._guard,
            after_step=after_step,
            at=self._watchdog.beat,
            costs=self._boundary.take_reports,
        )
        self.engine.start_domain(stage.num_steps, **schedule)
        method.on_train_start(self._domain)
        self._seed(SEEDED[phase])
        if first_step == 0:
            self._guard.start_domain(name)
        else:
            self._continue_steps(trainer)
        trainer.run(self._text.training_steps(stage, first_step), progress, first_step=first_step)
        self._trainer = None
        return at(stage.num_steps)

    def _after(self) -> None:
        self._network.num_rows = self._text.num_rows(self._stage.last_domain)
        self._seed(2)
        self._method.after_domain(self._domain)
        with self._watchdog.suspend_timeout("exporting"):
            self._prepare_new_tokens(self._stage.last_domain)
            self._export(self._stage)
        done = self._state.domains_done + 1
        self._enter(self._state.model_copy(update={"phase": "evaluate", "domains_done": done, "domain_step": 0}))

    def _enter(self, state: RunState, *, save: bool = True) -> None:
        """The present phase is over; a checkpoint makes it count."""
        self._passes.forget()
        self._close_opened()
        self._state = state
        if state.phase == "finished" or not state.global_step:
            # Whoever finds lines of metrics without a checkpoint knows that checkpoints were lost.
            self._boundary.settle()
            self._boundary.save(state, self._parts())
        else:
            self._pass_boundary(save=save)

    def _between_batches(self) -> None:
        self._watchdog.beat(f"a batch of phase {self._state.phase}", self._passes.num_batches)
        self._pass_boundary(save=self._passes.num_batches % self._config.checkpoint.interval == 0)

    def _pass_boundary(self, *, save: bool) -> None:
        self._boundary.pass_by(self._timed(self._state), self._parts, save=save)

    def _parts(self) -> Parts:
        in_domain = self._state.phase in SEEDED and self._state.domain_step > 0
        return {
            ENGINE: self.engine.state(in_domain=in_domain),
            METHOD: self._method.state_dict(),
            GENERATORS: ComponentState(local=get_rng_state()),
            PASSES: self._passes.state(),
            TRAINER: ComponentState() if self._trainer is None else self._trainer.state(),
            TEXT: ComponentState(numbers=self._text.fingerprints),
            GUARD: ComponentState(numbers=self._guard.state().model_dump(mode="json")),
        }

    def _domain_name(self, state: RunState) -> str:
        """The present stage, or the last where all are done."""
        return self._stages[min(state.domains_done, len(self._stages) - 1)].name

    def _save_arguments(self, state: RunState) -> dict[str, Any]:
        return {
            "domain": self._domain_name(state),
            "metrics_bytes": self._tracker.num_bytes(),
            "wandb_run_id": stored_run_id(self._folder.root),
        }

    def _load(self, manifest: Manifest) -> None:
        """Enter the phase of a checkpoint; what only its steps need is read when they begin."""
        info = self._ranks.info
        opened = CheckpointReader(
            self._store.folder, manifest, info, self.engine.zero_stage, self.engine.weights.shards
        )
        self._opened, self._state = opened, manifest.run
        self._text.check_unchanged(opened.part(TEXT).numbers)
        self.engine.load_weights(opened.part(ENGINE))
        self._method.load_state_dict(opened.part(METHOD))
        self._passes.load(opened.part(PASSES), opened.part(GENERATORS).local(), info.device)
        self._guard.load(LossGuardState.model_validate(opened.part(GUARD).numbers))

    def _continue_steps(self, trainer: DomainTrainer) -> None:
        assert self._opened is not None, "steps continue from a checkpoint"
        self.engine.load_domain(self._opened.part(ENGINE))
        trainer.load_state(self._opened.part(TRAINER))
        if generators := self._opened.part(GENERATORS).local():
            set_rng_state(generators)
        self._close_opened()

    def _close_opened(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _rollback(self) -> None:
        self._boundary.settle()
        self._close_opened()
        manifest = find_latest_valid(self._store, self._ranks)
        assert manifest is not None, "steps come after a checkpoint"
        self._trainer = None
        self._passes.forget()
        self._load(manifest)
        self._truncate_metrics(manifest)

    def _truncate_metrics(self, manifest: Manifest | None) -> None:
        num_bytes = manifest.metrics_bytes if manifest else 0
        self._ranks.run_on_main(lambda: self._tracker.truncate_after(self._state.global_step, num_bytes))

    @property
    def _stage(self) -> Stage:
        return self._stages[self._state.domains_done]

    @property
    def _domain(self) -> DomainContext:
        stage = self._stage

        def batches(label: str) -> ResumableLoop[Any]:
            return self._passes.over(self._text.importance_batches(stage.only_domain), label)

        def steps(label: str) -> ResumableLoop[Any]:
            return self._passes.over(self._text.importance_steps(stage.only_domain), label)

        folder = self._folder.domain(stage.index, stage.name)
        return DomainContext(
            stage.index,
            stage.name,
            batches,
            steps,
            self._folder.root,
            folder,
            suspend_timeout=self._watchdog.suspend_timeout,
            num_tokens=self._text.num_tokens(stage.last_domain),
        )

    def _prepare_new_tokens(self, learned: str) -> None:
        """Tokens of later domains begin as the mean of all tokens up to now, and nothing that befell them counts."""
        if (vocabulary := self._text.vocabulary) is not None:
            known, total = vocabulary.num_tokens[learned], vocabulary.total
            names = vocabulary_parameters(self._model)
            self.engine.weights.map_weights(names, lambda weight: mean_init_rows(weight, known, total))

    def _export(self, stage: Stage) -> None:
        corpus = stage.last_domain
        export_model(
            self._folder.model(stage.index, stage.name),
            self.engine,
            self._model,
            self._text.tokenizers[corpus],
            model_card(self._config, stage.index + 1, self._objective),
            dtype=self._export_dtype,
            num_rows=self._text.num_rows(corpus),
            lora=self._lora,
            adapter_folder=self._folder.adapter(stage.index, stage.name),
            base=self._config.model.name_or_path,
        )

    def _timed(self, state: RunState) -> RunState:
        seconds = self._earlier_seconds + time.monotonic() - self._began
        return state.model_copy(update={"wall_seconds": seconds})

    def _seed(self, phase: int) -> None:
        # Seeding at fixed points makes a run that was stopped between domains equal to one that was not.
        parts = [self._config.seed, self._state.domains_done, phase, self._ranks.info.rank]
        if self._state.domain_step:
            # On other ranks than before a domain goes on with masks of its own.
            parts.append(self._state.domain_step)
        seed_everything(int(numpy.random.SeedSequence(parts).generate_state(1)[0]))
