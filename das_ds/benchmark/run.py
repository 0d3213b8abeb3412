"""Scores the benchmarks of a config on every model of its run; the ranks share the items of each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from das_ds.benchmark.benchmarks import Benchmark, read_benchmarks
from das_ds.benchmark.log_likelihood import ChoiceScorer
from das_ds.benchmark.models import identify_weights, list_models, load_run_model
from das_ds.benchmark.scores import ModelBenchmarks, open_benchmarks, summarize_items, write_scores
from das_ds.config import RunConfig
from das_ds.distributed.process_group import ProcessGroup
from das_ds.models.run_models import RunModel, say_which_are_missing


def run_benchmarks(config: RunConfig, ranks: ProcessGroup) -> list[ModelBenchmarks]:
    """Score every model of the run on every benchmark that its file of scores lacks.

    The file of a model is written after each benchmark, so that an interruption loses at most one.

    Args:
        config: of the run, with the revisions that it has recorded.
        ranks: the process group; each rank has the complete model.

    Returns:
        Scores of each model in the order of training, on every rank.

    Raises:
        DasError: a benchmark, model or file that cannot be used.
    """
    torch.set_float32_matmul_precision(config.train.matmul_precision)
    benchmarks = ranks.main_process_first(lambda: read_benchmarks(config.benchmarks))
    # Rank 0 decides, because other ranks may not see the run folder, or a model that has just been exported.
    models = ranks.all_gather_object(list_models(config))[0]
    if ranks.info.is_main:
        say_which_are_missing(config, models)
    # All files first: what does not fit one of them is said before hours of work.
    recorded = [_open_scores(config, ranks, model, benchmarks) for model in models]
    return [
        _score_model(config, ranks, model, scores, benchmarks) for model, scores in zip(models, recorded, strict=True)
    ]


def _score_model(
    config: RunConfig, ranks: ProcessGroup, model: RunModel, scores: ModelBenchmarks, benchmarks: Sequence[Benchmark]
) -> ModelBenchmarks:
    """The scores of a model, completed; the file is written after each benchmark."""
    pending = [benchmark for benchmark in benchmarks if benchmark.name not in scores.tasks]
    if not pending:
        return scores
    # Rank 0 first: it downloads a model of the hub.
    network, spec, tokenizer = ranks.main_process_first(lambda: load_run_model(config, model))
    scorer = ChoiceScorer(
        network,
        spec,
        tokenizer,
        ranks.info,
        batch_size=config.benchmarks.batch_size,
        logits_mib=config.train.max_logits_mib,
    )
    for benchmark in pending:
        scored = scorer.score(benchmark, f"{benchmark.name}, {model.stage}")
        scores = scores.with_scores(benchmark.name, summarize_items(benchmark, scored))
        ranks.run_on_main(partial(write_scores, scores, model.scores_path))
    return scores


def _open_scores(
    config: RunConfig, ranks: ProcessGroup, model: RunModel, benchmarks: Sequence[Benchmark]
) -> ModelBenchmarks:
    """The scores in a model's file, which rank 0 reads."""

    def load() -> ModelBenchmarks:
        scores = open_benchmarks(model.scores_path, identify_weights(config, model), benchmarks)
        updated = scores.with_rules(benchmarks)
        if updated != scores:
            write_scores(updated, model.scores_path)
        return updated

    scores = ranks.all_gather_object(ranks.run_on_main(load))[0]
    assert scores is not None
    return scores
