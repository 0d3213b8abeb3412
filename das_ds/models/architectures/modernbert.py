"""ModernBERT: fused query, key and value projection, and a gated MLP with fused gate and up projection."""

from das_ds.functional.units import HEAD, INTERMEDIATE, OUTPUT, UnitRule
from das_ds.models.architectures.spec import ArchitectureSpec, GateSite

LAYER = "{base}.layers.{layer}"

MODERNBERT = ArchitectureSpec(
    model_type="modernbert",
    objective="mlm",
    units={HEAD: "num_attention_heads", INTERMEDIATE: "intermediate_size", OUTPUT: "hidden_size"},
    rules=(
        UnitRule(HEAD, f"{LAYER}.attn.Wqkv.weight", axis=0, layout="qkv"),
        UnitRule(HEAD, f"{LAYER}.attn.Wqkv.bias", axis=0, layout="qkv", optional=True),
        UnitRule(HEAD, f"{LAYER}.attn.Wo.weight", axis=1),
        UnitRule(INTERMEDIATE, f"{LAYER}.mlp.Wi.weight", axis=0, layout="gate_up"),
        UnitRule(INTERMEDIATE, f"{LAYER}.mlp.Wi.bias", axis=0, layout="gate_up", optional=True),
        UnitRule(INTERMEDIATE, f"{LAYER}.mlp.Wo.weight", axis=1, consumer=True),
        UnitRule(OUTPUT, f"{LAYER}.mlp.Wo.weight", axis=0),
        UnitRule(OUTPUT, f"{LAYER}.mlp.Wo.bias", axis=0, optional=True),
    ),
    sites=(
        GateSite(HEAD, f"{LAYER}.attn.Wo", "input"),
        GateSite(INTERMEDIATE, f"{LAYER}.mlp.Wo", "input"),
        GateSite(OUTPUT, f"{LAYER}.mlp.Wo", "output"),
    ),
    unmasked=(
        "{base}.embeddings.tok_embeddings.weight",
        "{base}.embeddings.norm.*",
        f"{LAYER}.attn.Wo.bias",
        f"{LAYER}.attn_norm.*",
        f"{LAYER}.mlp_norm.*",
        "{base}.final_norm.*",
        "head.*",
        "decoder.*",
    ),
    lm_head=("head", "decoder"),
    embeddings=("{base}.embeddings.tok_embeddings.weight", "{base}.embeddings.norm.*"),
)
