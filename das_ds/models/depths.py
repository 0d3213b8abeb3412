"""The depth of parameters: what is frozen from below, and whose learning rates decay from above."""

from __future__ import annotations

from transformers import PreTrainedModel

from das_ds.config import FrozenPart
from das_ds.errors import ConfigError
from das_ds.models.architectures.spec import ArchitectureSpec


def known_depths(model: PreTrainedModel, spec: ArchitectureSpec, key: str) -> dict[str, int]:
    """`ArchitectureSpec.depths` of a spec that names the embeddings.

    Args:
        model: the network, with LoRA or without.
        spec: its architecture spec.
        key: config key that needs them, and its value.

    Raises:
        ConfigError: no parameter of the network is one of the spec's embeddings.
    """
    depths = spec.depths(model)
    if 0 not in depths.values():
        raise ConfigError(
            f"{key}, but model.architecture.embeddings names no parameter of the network; list its embeddings there"
        )
    return depths


def frozen_parameters(model: PreTrainedModel, spec: ArchitectureSpec, part: FrozenPart | None) -> frozenset[str]:
    """Names of the parameters in a part of a network.

    Args:
        model: the network, without LoRA.
        spec: its architecture spec.
        part: None: nothing.

    Raises:
        ConfigError: more layers than the network has, or embeddings that the spec does not name.
    """
    if part is None:
        return frozenset()
    num_layers = model.config.num_hidden_layers
    if part.num_layers > num_layers:
        raise ConfigError(
            f"method.num_layers: found {part.num_layers}, allowed: at most {num_layers}, the layers of the network"
        )
    depths = known_depths(model, spec, "method.embeddings: found true") if part.embeddings else spec.depths(model)
    lowest = 0 if part.embeddings else 1
    return frozenset(name for name, depth in depths.items() if lowest <= depth <= part.num_layers)
