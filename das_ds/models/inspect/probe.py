"""Probe: a small network of a given class with random weights, on which architecture specs are derived and tested.

The weights of the real model are never loaded, whatever its size: the probe has the same classes and switches (biases,
norms, grouped heads), but few layers, and small sizes that all differ, so that an axis is known by its size.

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

NUM_LAYERS = 2
NUM_HEADS = 6
NUM_KEY_VALUE_HEADS = 2
HEAD_WIDTH = 8
INNER_SIZE = 80
VOCABULARY_SIZE = 100
NUM_POSITIONS = 40
NUM_EXPERTS = 4
EXPERTS_PER_TOKEN = 2
NUM_ROWS = 6
LENGTH = 16
INNER_NAMES = ("intermediate", "inner", "ffn", "hidden_dim")
MAX_PROBE_WEIGHTS = 200_000_000
"""Weights (0.8 GB in float32) up to which a network that cannot be narrowed is probed at full width."""


def probe_models(config: PretrainedConfig, objective: ObjectiveName) -> Iterator[PreTrainedModel]:
    """Probes to try: a narrow one, then one of full width if that is affordable.

    Raises:
        ModelError: neither can be built and run.
    """
    reasons = []
    for name, changes in (("narrow", _narrow_changes(config)), ("full-width", _short_changes(config))):
        try:
            small = type(config).from_dict({**config.to_dict(), **changes})
            with torch.device("meta"):
                size = sum(weight.numel() for weight in _build(small, objective).parameters())
            if size > MAX_PROBE_WEIGHTS:
                raise ValueError(f"{size} weights, more than the {MAX_PROBE_WEIGHTS} that are tried")
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = _build(small, objective).eval()
                # Biases and norms are initialized as constants, which would make different units look alike.
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.data += 0.1 * torch.randn_like(parameter)
            model(probe_ids(model))
        # An unknown class may run any code; the message of its error is the reason that the user reads.
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
    """The full-size model on the meta device, for names and shapes.

    Raises:
        ModelError: it cannot be built.
    """
    try:
        with torch.device("meta"):
            return _build(config, objective)
    # A config may hold any values, and a class may raise anything over them.
    except Exception as error:
        raise ModelError(f"cannot build a model of type {config.model_type!r}: {first_line(error)}") from error


def _build(config: PretrainedConfig, objective: ObjectiveName) -> PreTrainedModel:
    # Every class has eager attention.
    model: PreTrainedModel = AUTO_CLASSES[objective].from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    return model


def _short_changes(config: PretrainedConfig) -> dict[str, Any]:
    """Changes of a config that leave every layer intact: few layers, few tokens, few positions."""
    values = config.to_dict()
    num_layers = getattr(config, "num_hidden_layers", None)
    changes: dict[str, Any] = {_attribute_name(config, "num_hidden_layers"): NUM_LAYERS}
    for name, value in values.items():
        if isinstance(value, list) and len(value) == num_layers:
            changes[name] = value[:NUM_LAYERS]
        elif name.endswith("token_id") and isinstance(value, int) and value >= VOCABULARY_SIZE:
            changes[name] = 0
        elif value in ("relu", "relu2"):
            # A neuron that is dead for all tokens of the probe would have no gradient.
            changes[name] = "gelu"
    changes[_attribute_name(config, "vocab_size")] = VOCABULARY_SIZE
    for name in ("max_position_embeddings", "original_max_position_embeddings"):
        if _attribute_name(config, name) in values:
            changes[_attribute_name(config, name)] = NUM_POSITIONS
    if "initializer_range" in values:
        # Large enough that no gradient is lost in rounding.
        changes["initializer_range"] = 0.2
    return changes


def _narrow_changes(config: PretrainedConfig) -> dict[str, Any]:
    """`_short_changes`, and small values for all sizes that are known by name."""
    values = config.to_dict()
    hidden = getattr(config, "hidden_size", None)
    changes = _short_changes(config)
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
            changes[name] = min(value, EXPERTS_PER_TOKEN if "per_tok" in name else NUM_EXPERTS)
        elif any(word in name for word in INNER_NAMES):
            changes[name] = INNER_SIZE
    changes[_attribute_name(config, "num_attention_heads")] = NUM_HEADS
    return changes


def _attribute_name(config: PretrainedConfig, name: str) -> str:
    """The name under which a config class stores a standard attribute."""
    return str(config.attribute_map.get(name, name))
