"""A small network of a given class with random weights, on which tables can be tried.

Whatever the size of the model that a user names, its weights are never loaded: the probe has the same classes and the
same switches (biases, norms, grouped heads), but few layers and small sizes that differ from each other.

Shape legend: R rows, S positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from das_ds.config import ObjectiveName
from das_ds.errors import ModelError, first_line
from das_ds.models.loading import AUTO_CLASSES

NUM_LAYERS, NUM_HEADS, NUM_KEY_VALUE_HEADS, HEAD_WIDTH, INNER_SIZE = 2, 6, 2, 8, 80
VOCABULARY_SIZE, NUM_POSITIONS = 100, 40
NUM_ROWS, LENGTH = 6, 16
NUM_EXPERTS, EXPERTS_OF_A_TOKEN = 4, 2
INNER_NAMES = ("intermediate", "inner", "ffn", "hidden_dim")
LARGEST_PROBE = 200_000_000
"""Weights (0.8 GB in float32) up to which a network that cannot be narrowed is probed at its own width."""


def probe_models(config: PretrainedConfig, objective: ObjectiveName) -> Iterator[PreTrainedModel]:
    """Networks to try: a narrow one, then one of the model's own width where that is affordable.

    Raises:
        ModelError: none can be built or run.
    """
    reasons = []
    for name, changes in (("narrow", _narrow(config)), ("full-width", _short(config))):
        try:
            small = type(config).from_dict({**config.to_dict(), **changes})
            with torch.device("meta"):
                size = sum(weight.numel() for weight in _build(small, objective).parameters())
            if size > LARGEST_PROBE:
                raise ValueError(f"{size} weights, more than the {LARGEST_PROBE} that are tried")
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = _build(small, objective).eval()
                # Fresh biases and norms are constants, which would hide units that lie elsewhere.
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.data += 0.1 * torch.randn_like(parameter)
            model(probe_ids(model))
        # Any code may run in a network of an unknown class; what it raises is the reason that the user reads.
        except Exception as error:
            reasons.append(f"{name}: {first_line(error)}")
        else:
            yield model
    if len(reasons) == 2:
        raise ModelError(f"no small network of type {config.model_type!r} can be tried; {'; '.join(reasons)}")


def probe_ids(model: PreTrainedModel) -> torch.Tensor:
    """(R, S) random tokens, none of them special."""
    embeddings: Any = model.get_input_embeddings()
    return torch.randint(5, embeddings.num_embeddings, (NUM_ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def skeleton(config: PretrainedConfig, objective: ObjectiveName) -> PreTrainedModel:
    """The whole model without memory for its weights, for names and shapes.

    Raises:
        ModelError: it cannot be built.
    """
    try:
        with torch.device("meta"):
            return _build(config, objective)
    # The numbers of a config may be anything, and so may what a class raises over them.
    except Exception as error:
        raise ModelError(f"cannot build a model of type {config.model_type!r}: {first_line(error)}") from error


def _build(config: PretrainedConfig, objective: ObjectiveName) -> PreTrainedModel:
    # Eager attention is the one that every class has.
    model: PreTrainedModel = AUTO_CLASSES[objective].from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    return model


def _short(config: PretrainedConfig) -> dict[str, Any]:
    """Changes that leave every layer as it is: few layers, few tokens, few positions."""
    values = config.to_dict()
    num_layers = getattr(config, "num_hidden_layers", None)
    changes: dict[str, Any] = {_own_name(config, "num_hidden_layers"): NUM_LAYERS}
    for name, value in values.items():
        if isinstance(value, list) and len(value) == num_layers:
            changes[name] = value[:NUM_LAYERS]
        elif name.endswith("token_id") and isinstance(value, int) and value >= VOCABULARY_SIZE:
            changes[name] = 0
        elif value in ("relu", "relu2"):
            # A neuron that is dead for all tokens of a probe has no gradient and tells nothing.
            changes[name] = "gelu"
    changes[_own_name(config, "vocab_size")] = VOCABULARY_SIZE
    for name in ("max_position_embeddings", "original_max_position_embeddings"):
        if _own_name(config, name) in values:
            changes[_own_name(config, name)] = NUM_POSITIONS
    if "initializer_range" in values:
        # Wide enough that no gradient drowns in rounding.
        changes["initializer_range"] = 0.2
    return changes


def _narrow(config: PretrainedConfig) -> dict[str, Any]:
    """`_short`, and small sizes in place of all that are known by name."""
    values = config.to_dict()
    hidden = getattr(config, "hidden_size", None)
    changes = _short(config)
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        if value == hidden:
            changes[name] = NUM_HEADS * HEAD_WIDTH
        elif "head" in name and ("kv" in name or "key_value" in name):
            changes[name] = 1 if value == 1 else NUM_KEY_VALUE_HEADS
        elif name == "head_dim":
            changes[name] = HEAD_WIDTH
        elif name == "rotary_dim":
            changes[name] = HEAD_WIDTH // 2
        elif "experts" in name:
            changes[name] = min(value, EXPERTS_OF_A_TOKEN if "per_tok" in name else NUM_EXPERTS)
        elif any(part in name for part in INNER_NAMES):
            changes[name] = INNER_SIZE
    changes[_own_name(config, "num_attention_heads")] = NUM_HEADS
    return changes


def _own_name(config: PretrainedConfig, name: str) -> str:
    return str(config.attribute_map.get(name, name))
