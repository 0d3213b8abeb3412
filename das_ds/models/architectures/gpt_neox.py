"""GPT-NeoX and Pythia: one matrix contains the query, key and value rows of each head, head by head."""

from das_ds.functional.units import HEAD, INTERMEDIATE, OUTPUT, UnitRule
from das_ds.models.architectures.spec import ArchitectureSpec, GateSite

LAYER = "{base}.layers.{layer}"

GPT_NEOX = ArchitectureSpec(
    model_type="gpt_neox",
    objective="clm",
    units={HEAD: "num_attention_heads", INTERMEDIATE: "intermediate_size", OUTPUT: "hidden_size"},
    rules=(
        UnitRule(HEAD, f"{LAYER}.attention.query_key_value.weight", axis=0),
        UnitRule(HEAD, f"{LAYER}.attention.query_key_value.bias", axis=0, optional=True),
        UnitRule(HEAD, f"{LAYER}.attention.dense.weight", axis=1),
        UnitRule(INTERMEDIATE, f"{LAYER}.mlp.dense_h_to_4h.weight", axis=0),
        UnitRule(INTERMEDIATE, f"{LAYER}.mlp.dense_h_to_4h.bias", axis=0),
        UnitRule(INTERMEDIATE, f"{LAYER}.mlp.dense_4h_to_h.weight", axis=1, consumer=True),
        UnitRule(OUTPUT, f"{LAYER}.mlp.dense_4h_to_h.weight", axis=0),
        UnitRule(OUTPUT, f"{LAYER}.mlp.dense_4h_to_h.bias", axis=0),
    ),
    sites=(
        GateSite(HEAD, f"{LAYER}.attention.dense", "input"),
        GateSite(INTERMEDIATE, f"{LAYER}.mlp.dense_h_to_4h", "output"),
        GateSite(OUTPUT, f"{LAYER}.mlp.dense_4h_to_h", "output"),
    ),
    unmasked=(
        "{base}.embed_in.weight",
        f"{LAYER}.input_layernorm.*",
        f"{LAYER}.post_attention_layernorm.*",
        f"{LAYER}.attention.dense.bias",
        "{base}.final_layer_norm.*",
        "lm_head.weight",
    ),
    lm_head=("lm_head",),
    embeddings=("{base}.embed_in.weight",),
)
