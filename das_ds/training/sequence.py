"""A whole run: domains in order, with evaluation before the first and after each, export, results and report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy

from das_ds.config import RunConfig
from das_ds.deepspeed_config import build_deepspeed_config
from das_ds.distributed.launch import Ranks, seed_everything
from das_ds.distributed.sharded_construction import sharded_construction
from das_ds.errors import RunFolderError
from das_ds.evaluation.report import IMPORTANCE_PICTURE, LOSS_MATRIX_PICTURE, write_report
from das_ds.evaluation.results import RESULTS_FILE, Results, build_results, write_results
from das_ds.functional.vocabulary import with_mean_rows
from das_ds.methods import METHODS
from das_ds.methods.base import DomainContext, Method
from das_ds.methods.context import build_context
from das_ds.models.loading import check_sequence_length, find_adapter, load_model, open_tokenizer
from das_ds.models.vocabulary import reserve_rows, vocabulary_parameters
from das_ds.tracking.names import IMPORTANCE, LOSS_MATRIX
from das_ds.tracking.tracker import Tracker, build_tracker
from das_ds.training.domain import DomainTrainer, Progress
from das_ds.training.evaluate import evaluate_corpora
from das_ds.training.export import export_lora, export_model, model_card
from das_ds.training.manifest import RunState, read_state
from das_ds.training.run_folder import RunFolder, open_run_folder
from das_ds.training.text import RunText, evaluated, prepare_text


def run_sequence(config: RunConfig, ranks: Ranks) -> Results:
    """Start a run, or continue it after its last finished domain; returns the final results on every rank.

    Raises:
        DasError: anything in the config, data, model or run folder that the user has to mend.
    """
    deepspeed_config = build_deepspeed_config(config, ranks.info.world_size)
    folder = ranks.first_main_then_others(lambda: open_run_folder(config))
    text = ranks.first_main_then_others(lambda: prepare_text(config, ranks.info, find_adapter(config.model).objective))
    with build_tracker(config, enabled=ranks.info.is_main) as tracker:
        sequence = DomainSequence(config, ranks, folder, text, tracker, deepspeed_config)
        try:
            return sequence.run()
        finally:
            sequence.engine.close()


class DomainSequence:
    """The phases of a run over one engine."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        folder: RunFolder,
        text: RunText,
        tracker: Tracker,
        deepspeed_config: dict[str, Any],
    ) -> None:
        self._config, self._ranks, self._folder, self._text, self._tracker = config, ranks, folder, text, tracker
        self._state = read_state(folder.root)
        self._began = time.monotonic()
        method_class = METHODS[config.method.name]
        done = self._state.domains_done
        last = (done - 1, config.domains[done - 1].name) if done and not method_class.starts_from_base else None
        is_lora = config.model.lora is not None
        # Parameters that are born as shards cannot be given more rows.
        construction = sharded_construction(deepspeed_config, ranks) if text.vocabulary is None else None
        self._model, adapter = load_model(
            config.model,
            seed=config.seed,
            vocab_size=len(text.tokenizers[last[1]] if last and not is_lora else text.base_tokenizer),
            weights=folder.model(*last) if last and not is_lora else None,
            construction=construction,
        )
        check_sequence_length(self._model, adapter, config.data.sequence_length)
        if text.vocabulary is not None:
            if last:
                _check_tokens(folder.model(*last), text, last[1])
            known = text.vocabulary.num_tokens[last[1]] if last else text.vocabulary.base_tokens
            reserve_rows(self._model, known, text.vocabulary.total)
        context = build_context(
            config,
            self._model,
            adapter,
            deepspeed_config,
            ranks,
            exact=construction.slices if construction else None,
            lora_weights=folder.adapter(*last) if last and is_lora else None,
        )
        self.engine, self._lora, self._network = context.engine, context.lora, context.network
        self._base = self.engine.snapshot() if method_class.starts_from_base else None
        self._method: Method = method_class(context)

    def run(self) -> Results:
        """All domains that are still to be learned."""
        done = self._state.domains_done
        self._tracker.truncate_after(self._state.global_step)
        if self._state.loss_matrix:
            learned = self._config.domains[:done]
            self._method.load(self._folder.root, [self._folder.domain(i, d.name) for i, d in enumerate(learned)])
        else:
            self._finish_stage(self._state)
        for index in range(done, len(self._config.domains)):
            self._learn(index)
        return self._results()

    def _learn(self, index: int) -> None:
        name, train = self._config.domains[index].name, self._config.train
        if self._base is not None:
            self.engine.restore(self._base)
        domain = DomainContext(
            index,
            name,
            lambda label: self._text.importance_batches(name, label),
            lambda label: self._text.importance_steps(name, label),
        )
        self._network.num_rows = self._text.num_rows(name)
        self._seed(index, phase=0)
        self._method.before_domain(domain)
        self._seed(index, phase=1)
        tokens_per_step = train.global_batch_size * self._config.data.sequence_length
        progress = Progress(name, self._state.global_step, self._state.tokens_seen, tokens_per_step)
        trainer = DomainTrainer(self.engine, self._method, self._tracker, train)
        trainer.run(self._text.training_steps(name), progress)
        self._method.after_domain(domain)
        self._prepare_new_tokens(name)
        self._export(index, name)
        self._finish_stage(
            self._state.model_copy(
                update={
                    "domains_done": index + 1,
                    "global_step": progress.global_step + train.steps_per_domain,
                    "tokens_seen": progress.tokens_seen + train.steps_per_domain * tokens_per_step,
                }
            )
        )

    def _prepare_new_tokens(self, learned: str) -> None:
        """Tokens of later domains begin as the mean of all tokens up to now, and nothing that befell them counts."""
        if (vocabulary := self._text.vocabulary) is not None:
            known, total = vocabulary.num_tokens[learned], vocabulary.total
            names = vocabulary_parameters(self._model)
            self.engine.rewrite(names, lambda weight: with_mean_rows(weight, known, total))

    def _export(self, index: int, name: str) -> None:
        card = model_card(self._config, index + 1)
        model, tokenizer = self._folder.model(index, name), self._text.tokenizers[name]
        if self._lora is None:
            export_model(model, self.engine, self._model, tokenizer, card, num_rows=self._text.num_rows(name))
        else:
            adapter = self._folder.adapter(index, name)
            export_lora(model, adapter, self.engine, self._lora, self._config, tokenizer, card)
        self._method.save(self._folder.root, self._folder.domain(index, name))

    def _finish_stage(self, state: RunState) -> None:
        """Evaluate, and make the stage count: the state file is written last."""
        row = evaluate_corpora(self._network, self._text, f"after {state.domains_done} domains")
        now = time.monotonic()
        self._state = state.model_copy(
            update={
                "loss_matrix": [*state.loss_matrix, list(row.values())],
                "wall_seconds": state.wall_seconds + now - self._began,
            }
        )
        self._began = now
        if self._ranks.info.is_main:
            results = self._results()
            write_results(results, self._folder.root / RESULTS_FILE)
            self._report(results, row)
            self._state.write(self._folder.root)
        self._ranks.barrier()

    def _report(self, results: Results, row: dict[str, float]) -> None:
        importance = self._method.accumulated_importance()
        report = write_report(self._folder.root, results, importance)
        self._tracker.log_evaluation(row, domains_learned=self._state.domains_done, global_step=self._state.global_step)
        self._tracker.log_table(LOSS_MATRIX, *results.table)
        self._tracker.log_picture(LOSS_MATRIX, report / LOSS_MATRIX_PICTURE)
        if importance is not None:
            self._tracker.log_picture(IMPORTANCE, report / IMPORTANCE_PICTURE)
        self._tracker.log_summary(results.summary)

    def _seed(self, index: int, *, phase: int) -> None:
        # Seeding at fixed points makes a run that was stopped between domains equal to one that was not.
        parts = [self._config.seed, index, phase, self._ranks.info.rank]
        seed_everything(int(numpy.random.SeedSequence(parts).generate_state(1)[0]))

    def _results(self) -> Results:
        config = self._config
        return build_results(
            method=config.method.name,
            domains=[domain.name for domain in config.domains],
            eval_domains=[corpus.name for corpus in evaluated(config)],
            loss_matrix=self._state.loss_matrix,
            tokens_seen=self._state.tokens_seen,
            wall_seconds=self._state.wall_seconds,
            world_size=self._ranks.info.world_size,
            zero_stage=self.engine.zero_stage,
        )


def _check_tokens(exported: Path, text: RunText, domain: str) -> None:
    """A file of tokens may have changed since, which the recorded config does not show."""
    if open_tokenizer(str(exported)).get_vocab() != text.tokenizers[domain].get_vocab():
        raise RunFolderError(
            f"{exported}: learned with other tokens than data.add_tokens now gives up to {domain}; put the lists back "
            "as they were or use another folder"
        )
