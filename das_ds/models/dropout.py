"""Whether a network has dropout of its own."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

PROBABILITIES = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "dropout",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "mlp_dropout",
    "resid_pdrop",
)
"""Config attributes that make two passes of one text differ; dropout of classification heads does not."""


def has_dropout(config: PretrainedConfig, probabilities: Sequence[str] = PROBABILITIES) -> bool:
    """Whether any of these attributes of the network's config, as far as it has them, is above 0."""
    return any((getattr(config, name, None) or 0.0) > 0.0 for name in probabilities)
