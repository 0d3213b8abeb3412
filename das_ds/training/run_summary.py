"""Description of a run for its first lines on the screen."""

from __future__ import annotations

from das_ds.config import RunConfig
from das_ds.config.stage import Stage
from das_ds.context import RunContext
from das_ds.engine.zero import full_numel
from das_ds.training.console import DomainSummary, RunSummary, SourceSummary
from das_ds.training.data_module import DataModule, eval_corpora


def summarize_run(config: RunConfig, context: RunContext, data: DataModule, resumes: str | None) -> RunSummary:
    """Describe a run.

    Args:
        config: of the run.
        context: its engine and network.
        data: its text.
        resumes: where it resumes, in words; None: it starts.
    """
    engine = context.engine
    model = context.network.model
    return RunSummary(
        method=config.method.name,
        model=f"{config.model.name_or_path or 'random weights'} ({model.config.model_type})",
        # Under ZeRO-3 a parameter is an empty vector whose complete size DeepSpeed knows.
        num_parameters=sum(full_numel(parameter) for parameter in model.parameters()),
        num_trained=sum(full_numel(parameter) for parameter in engine.parameters.values()),
        objective=context.objective,
        device=engine.ranks.info.device.type,
        num_ranks=engine.ranks.info.world_size,
        zero_stage=engine.zero_stage,
        precision=config.train.precision,
        optimizer=config.train.optimizer,
        micro_batch_size=config.train.micro_batch_size,
        global_batch_size=config.train.global_batch_size,
        sequence_length=config.data.sequence_length,
        domains=[_summarize_stage(stage, config, data) for stage in config.own_stages],
        eval_corpora=[corpus.name for corpus in eval_corpora(config)],
        output_dir=str(config.output_dir),
        continues=None if config.continue_from is None else config.continue_from.in_words,
        resumes=resumes,
    )


def _summarize_stage(stage: Stage, config: RunConfig, data: DataModule) -> DomainSummary:
    weights = stage.weights or (1,) * len(stage.domains)
    sources = []
    num_samples = 0
    for domain, weight in zip(stage.domains, weights, strict=True):
        num_own = stage.num_steps * weight // sum(weights) * config.own_samples_per_step(domain)
        num_samples += num_own
        sources += [
            SourceSummary(name, num_blocks, num_seen)
            for name, (num_blocks, num_seen) in data.source_visits(domain, num_own).items()
        ]
    sizes = [data.num_training_blocks(domain) for domain in stage.domains]
    return DomainSummary(
        name=stage.name,
        num_blocks=None if None in sizes else sum(size for size in sizes if size is not None),
        num_steps=stage.num_steps,
        num_samples=num_samples,
        sources=sources,
    )
