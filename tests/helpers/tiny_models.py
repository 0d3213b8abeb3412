"""Small networks of the real classes; non-square sizes, so that rows cannot pass for columns."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from das_ds.models.loading import AUTO_CLASSES
from das_ds.models.registry import adapter_for

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 6, "pad_token_id": 0}
"""Six heads of a width of their own, three to a key/value head."""
ATTENTION = {"deberta-v2": "eager", "gemma2": "eager"}
"""Where the class has no sdpa."""
SIZES_OF: dict[str, dict[str, Any]] = {
    "deberta-v2": {
        "relative_attention": True,
        "position_buckets": 8,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": False,
        "norm_rel_ebd": "layer_norm",
        "type_vocab_size": 0,
        "position_biased_input": False,
    },
    "distilbert": {"dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40},
    "electra": {"embedding_size": 16},
    "modernbert": {"pad_token_id": 0, "attention_bias": True, "mlp_bias": True, "global_attn_every_n_layers": 2},
    "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 40, "n_positions": 40},
    "gpt_neox": {"rotary_pct": 1.0},
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 16},
    "llama": {**GROUPED, "attention_bias": True, "mlp_bias": True},
    "mistral": {**GROUPED, "sliding_window": 8},
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    # Caps that bend: at the usual ones a tiny network's logits would not notice.
    "gemma2": {**GROUPED, "query_pre_attn_scalar": 6, "final_logit_softcapping": 3.0, "sliding_window": 8},
    "gemma3_text": {**GROUPED, "query_pre_attn_scalar": 6, "sliding_window": 8},
    "phi3": {**GROUPED, "head_dim": 4},
    "olmo2": {**GROUPED, "head_dim": 4},
    "mixtral": {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {**GROUPED, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
}


def without_dropout(model_type: str) -> dict[str, float]:
    """Config values that switch off all dropout that this architecture has."""
    config = AutoConfig.for_model(model_type)
    return {name: 0.0 for name in adapter_for(model_type).dropouts if hasattr(config, name)}


def tiny_model(model_type: str = "roberta", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model with random weights of a size at which gradients are not lost in rounding."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {**SIZES, "initializer_range": 0.2, **SIZES_OF.get(model_type, {}), **changes}
        config = AutoConfig.for_model(model_type, **sizes)
        model: PreTrainedModel = AUTO_CLASSES[adapter_for(model_type).objective].from_config(
            config, attn_implementation=ATTENTION.get(model_type, "sdpa")
        )
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
