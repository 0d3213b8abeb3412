"""The network of a planned run, read from its config: neither weights nor text are needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from das_ds.config import RunConfig
from das_ds.data.tokenizers import build_tokenizers
from das_ds.functional.token_ids import num_tokens
from das_ds.functional.units import UnitLayout
from das_ds.models.depths import frozen_parameters
from das_ds.models.flops import StepFlops, run_step_flops
from das_ds.models.inspect.probe import skeleton
from das_ds.models.loading import check_sequence_length, find_spec, load_tokenizer, model_config
from das_ds.models.lora import Lora
from das_ds.models.size import ModelSize
from das_ds.preflight.memory import count_parameters
from das_ds.preflight.traffic import WeightSizes


@dataclass(frozen=True)
class PlannedModel:
    """Sizes of a network, and the operations of a plain step."""

    size: ModelSize
    weights: WeightSizes
    flops: StepFlops
    """Of one optimizer step over the global batch."""


def read_model(config: RunConfig) -> PlannedModel:
    """The network of a run, built on the meta device from its config alone.

    A tokenizer is needed only where it decides on the size of the network: with `data.add_tokens`, and with
    `model.config` that names no `vocab_size`.

    Raises:
        ConfigError, ModelError, DataError: a config, an architecture or a tokenizer that cannot be read, or sequences
            that are longer than the network's positions.
    """
    architecture = find_spec(config.model)
    vocab_size, num_added = _count_tokens(config)
    defaults = {} if vocab_size is None else {"vocab_size": vocab_size}
    network = skeleton(model_config(config.model, **defaults), architecture.objective)
    check_sequence_length(network, architecture, config.data.sequence_length)
    embedding: Any = network.get_input_embeddings()
    num_rows = 0 if vocab_size is None else vocab_size + num_added
    size = count_parameters(config, network, architecture, num_rows)
    layout = architecture.layout(network)
    added_rows = size.vocabulary - int(embedding.weight.shape[0])
    flops = run_step_flops(network, config, architecture.objective, layout.num_layers)
    frozen = frozen_parameters(network, architecture, config.method.frozen_part)
    adapters = _adapter_sizes(config, network, layout)
    return PlannedModel(size, WeightSizes.of_layout(layout, adapters, added_rows, frozen), flops)


def _count_tokens(config: RunConfig) -> tuple[int | None, int]:
    """Tokens of the base tokenizer, and those that domains add; None where nothing asks for the tokenizer."""
    names_its_size = config.model.config is None or "vocab_size" in config.model.config
    if names_its_size and not config.data.add_tokens:
        return None, 0
    base = load_tokenizer(config)
    num_base = num_tokens(base.get_vocab())
    largest = max(num_tokens(tokenizer.get_vocab()) for tokenizer in build_tokenizers(config, base).values())
    return num_base, largest - num_base


def _adapter_sizes(config: RunConfig, network: PreTrainedModel, layout: UnitLayout) -> tuple[int, ...]:
    """Sizes of LoRA's two matrices of every layer that has them; () without LoRA."""
    if config.model.lora is None:
        return ()
    linears = Lora.plan(network, layout, config.model.lora).linears
    return tuple(linear.rank * width for linear in linears for width in (linear.num_inputs, linear.num_outputs))
