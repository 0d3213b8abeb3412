"""Small networks of the real classes; non-square sizes, so that rows cannot pass for columns."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def tiny_model(model_type: str = "roberta", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model with random weights of a size at which gradients are not lost in rounding."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(model_type, **{**SIZES, "initializer_range": 0.2, **changes})
        model: PreTrainedModel = AutoModelForMaskedLM.from_config(config, attn_implementation="sdpa")
        # Fresh biases and norms are constants, which would hide a mask on the wrong entry.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def random_importance(model: PreTrainedModel, seed: int = 0) -> dict[str, torch.Tensor]:
    """Group -> (L, U) in [0, 1], with units at exactly 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    sizes = {
        "head": config.num_attention_heads,
        "intermediate": config.intermediate_size,
        "output": config.hidden_size,
    }
    importance = {g: torch.rand(config.num_hidden_layers, size, generator=generator) for g, size in sizes.items()}
    for values in importance.values():
        values[0, 0], values[-1, -1] = 0.0, 1.0
    return importance
