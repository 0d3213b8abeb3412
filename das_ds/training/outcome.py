"""Results of a run from the state it is in."""

from __future__ import annotations

from das_ds.checkpointing.manifest import RunState
from das_ds.config import RunConfig
from das_ds.evaluation.results import Results, build_results
from das_ds.training.text import evaluated


def results_of(config: RunConfig, state: RunState, world_size: int, zero_stage: int) -> Results:
    """What is known after the evaluations that the state counts.

    Raises:
        TrainingError: a loss is not finite.
    """
    return build_results(
        method=config.method.name,
        domains=[domain.name for domain in config.domains],
        eval_domains=[corpus.name for corpus in evaluated(config)],
        loss_matrix=state.loss_matrix,
        tokens_seen=state.tokens_seen,
        wall_seconds=state.wall_seconds,
        world_size=world_size,
        zero_stage=zero_stage,
    )
