"""Small networks of the real classes; non-square sizes, so that rows cannot pass for columns."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from das_ds.models.architectures.registry import spec_for
from das_ds.models.loading import AUTO_CLASSES

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Six query heads of eight dimensions share two key/value heads; together they are wider than the hidden states.
GROUPED = {**SIZES, **SPECIAL_TOKENS, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
# Products of many experts at once ask for rows of multiples of 16 bytes, in bfloat16 too.
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "roberta": SIZES,
    "xlm-roberta": SIZES,
    "distilbert": {
        "vocab_size": 100,
        "dim": 24,
        "n_layers": 2,
        "n_heads": 3,
        "hidden_dim": 40,
        "max_position_embeddings": 40,
    },
    "electra": {**SIZES, "embedding_size": 16},
    # The settings of v3, with position buckets as small as the model.
    "deberta-v2": {
        **SIZES,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
    },
    "modernbert": {
        **SIZES,
        **SPECIAL_TOKENS,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "local_attention": 8,
        "attention_bias": True,
        "mlp_bias": True,
        "norm_bias": True,
    },
    "gpt2": {
        **SPECIAL_TOKENS,
        "vocab_size": 100,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 3,
        "n_inner": 40,
        "n_positions": 40,
    },
    "gpt_neox": {**SIZES, **SPECIAL_TOKENS},
    "opt": {
        **SPECIAL_TOKENS,
        "vocab_size": 100,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "ffn_dim": 40,
        "max_position_embeddings": 40,
        "word_embed_proj_dim": 16,
    },
    "llama": {**GROUPED, "attention_bias": True, "mlp_bias": True},
    "mistral": {**GROUPED, "sliding_window": 8},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "attention_bias": True},
    "olmo2": {**GROUPED, "attention_bias": True},
    "gemma2": {**GROUPED, "attention_bias": True, "sliding_window": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {**GROUPED, "attention_bias": True, "sliding_window": 8, "final_logit_softcapping": 5.0},
    "phi3": GROUPED,
    "mixtral": {**GROUPED, **EXPERTS, "intermediate_size": 16},
    "qwen3_moe": {**GROUPED, **EXPERTS, "moe_intermediate_size": 16, "attention_bias": True},
}
WITHOUT_SDPA = ("gemma2", "deberta-v2")


def tiny_model(model_type: str = "roberta", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model with random weights of a size at which gradients are not lost in rounding."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], "initializer_range": 0.2, **changes})
        auto_class = AUTO_CLASSES[spec_for(model_type).objective]
        attention = "eager" if model_type in WITHOUT_SDPA else "sdpa"
        model: PreTrainedModel = auto_class.from_config(config, attn_implementation=attention)
        # Fresh biases and norms are constants, which would hide a mask on the wrong entry.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def without_dropout(model_type: str) -> dict[str, float]:
    """Changes of a config that switch dropout off."""
    config = AutoConfig.for_model(model_type)
    return {name: 0.0 for name in spec_for(model_type).dropouts if hasattr(config, name)}


def random_importance(model: PreTrainedModel, seed: int = 0) -> dict[str, torch.Tensor]:
    """Group -> (L, U) in [0, 1], with units at exactly 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    layout = spec_for(model.config.model_type).layout(model)
    sizes = {group: layout.num_units[group] for group in ("head", "intermediate", "output")}
    importance = {g: torch.rand(layout.num_layers, size, generator=generator) for g, size in sizes.items()}
    for values in importance.values():
        values[0, 0] = 0.0
        values[-1, -1] = 1.0
    return importance
