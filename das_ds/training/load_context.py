"""Loading the model of a run and putting it under an engine."""

from __future__ import annotations

from das_ds.config import RunConfig
from das_ds.config.deepspeed import EngineConfig
from das_ds.context import RunContext, build_context
from das_ds.distributed.process_group import ProcessGroup
from das_ds.engine.sharded_init import sharded_init
from das_ds.functional.token_ids import num_tokens
from das_ds.models.loading import check_sequence_length, load_model, print_weights_summary
from das_ds.models.vocabulary import reserve_embedding_rows
from das_ds.training.data_module import DataModule


def load_context(config: RunConfig, data: DataModule, engine_config: EngineConfig, ranks: ProcessGroup) -> RunContext:
    """Load the model, sharded while it is built where possible, and put it under an engine.

    Raises:
        ModelError: weights or an architecture spec that do not fit the network.
        ConfigError: settings that do not fit the network; see `build_context`.
    """
    vocabulary = data.vocabulary
    # Sharded parameters cannot be resized, so runs that add tokens build the full model first.
    construction = sharded_init(engine_config, ranks) if vocabulary is None else None
    model, spec = load_model(
        config.model,
        seed=config.seed,
        vocab_size=num_tokens(data.base_tokenizer.get_vocab()),
        construction=construction,
    )
    if ranks.info.is_main:
        print_weights_summary(model)
    check_sequence_length(model, spec, config.data.sequence_length)
    if vocabulary is not None:
        reserve_embedding_rows(model, vocabulary.base_tokens, vocabulary.total)
    return build_context(
        config,
        model,
        spec,
        engine_config,
        ranks,
        exact=construction.take_exact_weights() if construction else None,
        tokens=data.all_tokens,
        num_base_tokens=None if vocabulary is None else vocabulary.base_tokens,
    )
