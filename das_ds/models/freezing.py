"""Freezing the lower part of a network."""

from __future__ import annotations

from transformers import PreTrainedModel

from das_ds.config import FrozenPart
from das_ds.errors import ConfigError
from das_ds.models.architectures.spec import ArchitectureSpec


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
    depths = spec.depths(model)
    if part.embeddings and 0 not in depths.values():
        raise ConfigError(
            "method.embeddings: found true, but model.architecture.embeddings names no parameter of the network; "
            "list its embeddings there"
        )
    lowest = 0 if part.embeddings else 1
    return frozenset(name for name, depth in depths.items() if lowest <= depth <= part.num_layers)
