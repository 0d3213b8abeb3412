"""OPT: a decoder with plain layers like BERT's.

Its position embedding has two more rows than `max_position_embeddings`, so that tokens can use all of these positions.
"""

from typing import Any

from das_ds.functional.units import HEAD, INTERMEDIATE, OUTPUT, UnitRule
from das_ds.models.architectures.spec import ArchitectureSpec, GateSite

LAYER = "{base}.decoder.layers.{layer}"


def skips_layers(config: Any) -> str | None:
    """Layer dropout would skip different layers on different ranks, whose collectives would then not match."""
    return f"layerdrop: found {config.layerdrop}, allowed: 0" if config.layerdrop else None


OPT = ArchitectureSpec(
    model_type="opt",
    objective="clm",
    units={HEAD: "num_attention_heads", INTERMEDIATE: "ffn_dim", OUTPUT: "hidden_size"},
    rules=(
        UnitRule(HEAD, f"{LAYER}.self_attn.q_proj.weight", axis=0),
        UnitRule(HEAD, f"{LAYER}.self_attn.q_proj.bias", axis=0, optional=True),
        UnitRule(HEAD, f"{LAYER}.self_attn.k_proj.weight", axis=0),
        UnitRule(HEAD, f"{LAYER}.self_attn.k_proj.bias", axis=0, optional=True),
        UnitRule(HEAD, f"{LAYER}.self_attn.v_proj.weight", axis=0),
        UnitRule(HEAD, f"{LAYER}.self_attn.v_proj.bias", axis=0, optional=True),
        UnitRule(HEAD, f"{LAYER}.self_attn.out_proj.weight", axis=1),
        UnitRule(INTERMEDIATE, f"{LAYER}.fc1.weight", axis=0),
        UnitRule(INTERMEDIATE, f"{LAYER}.fc1.bias", axis=0, optional=True),
        UnitRule(INTERMEDIATE, f"{LAYER}.fc2.weight", axis=1, consumer=True),
        UnitRule(OUTPUT, f"{LAYER}.fc2.weight", axis=0),
        UnitRule(OUTPUT, f"{LAYER}.fc2.bias", axis=0, optional=True),
    ),
    sites=(
        GateSite(HEAD, f"{LAYER}.self_attn.out_proj", "input"),
        GateSite(INTERMEDIATE, f"{LAYER}.fc1", "output"),
        GateSite(OUTPUT, f"{LAYER}.fc2", "output"),
    ),
    unmasked=(
        "{base}.decoder.embed_tokens.weight",
        "{base}.decoder.embed_positions.weight",
        "{base}.decoder.project_in.weight",
        "{base}.decoder.project_out.weight",
        f"{LAYER}.self_attn.out_proj.bias",
        f"{LAYER}.self_attn_layer_norm.*",
        f"{LAYER}.final_layer_norm.*",
        "{base}.decoder.final_layer_norm.*",
        "lm_head.weight",
    ),
    lm_head=("lm_head",),
    embeddings=(
        "{base}.decoder.embed_tokens.weight",
        "{base}.decoder.embed_positions.weight",
        "{base}.decoder.project_in.weight",
    ),
    unsupported=skips_layers,
)
