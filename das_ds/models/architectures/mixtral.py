"""Mixtral and Qwen3-MoE: Llama's attention, and experts with separate intermediate units.

Output units are shared by all experts: row o of every expert's down projection belongs to unit o. The router belongs to
no unit, because it chooses between units.
"""

from dataclasses import replace
from typing import Any

from das_ds.functional.units import HEAD, INTERMEDIATE, OUTPUT, UnitRule
from das_ds.models.architectures.llama import ATTENTION_RULES, ATTENTION_SITE, LAYER, LLAMA, SHARED_HEAD_NORMS
from das_ds.models.architectures.spec import GateSite

EXPERTS = f"{LAYER}.mlp.experts"


def has_dense_layers(config: Any) -> str | None:
    """Layers with a dense MLP have another number of intermediate units, which one spec cannot describe."""
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        return (
            "models of which only some layers have experts: found "
            f"mlp_only_layers {config.mlp_only_layers} and decoder_sparse_step {config.decoder_sparse_step}, "
            "allowed: [] and 1"
        )
    return None


MIXTRAL = replace(
    LLAMA,
    model_type="mixtral",
    units={
        HEAD: "num_attention_heads",
        INTERMEDIATE: "num_local_experts*intermediate_size",
        OUTPUT: "hidden_size",
    },
    rules=(
        *ATTENTION_RULES,
        UnitRule(INTERMEDIATE, f"{EXPERTS}.gate_up_proj", axis=0, layout="experts_gate_up"),
        UnitRule(INTERMEDIATE, f"{EXPERTS}.down_proj", axis=1, layout="experts", consumer=True),
        UnitRule(OUTPUT, f"{EXPERTS}.down_proj", axis=0),
    ),
    sites=(
        ATTENTION_SITE,
        GateSite(INTERMEDIATE, EXPERTS, "experts"),
        GateSite(OUTPUT, EXPERTS, "output"),
    ),
    unmasked=(*LLAMA.unmasked, f"{LAYER}.mlp.gate.weight"),
    dropouts=("attention_dropout", "router_jitter_noise"),
)
QWEN3_MOE = replace(
    MIXTRAL,
    model_type="qwen3_moe",
    units={**MIXTRAL.units, INTERMEDIATE: "num_experts*moe_intermediate_size"},
    unmasked=(*MIXTRAL.unmasked, *SHARED_HEAD_NORMS),
    dropouts=("attention_dropout",),
    unsupported=has_dense_layers,
)
