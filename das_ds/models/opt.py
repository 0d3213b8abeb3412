"""OPT."""

from das_ds.functional.units import HEAD, INTERMEDIATE, OUTPUT, UnitRule
from das_ds.models.adapter import ArchitectureAdapter, GateSite

LAYER = "{base}.decoder.layers.{layer}"

OPT = ArchitectureAdapter(
    model_type="opt",
    objective="clm",
    units={HEAD: "num_attention_heads", INTERMEDIATE: "ffn_dim", OUTPUT: "hidden_size"},
    rules=(
        *(UnitRule(HEAD, f"{LAYER}.self_attn.{name}_proj.weight", axis=0) for name in ("q", "k", "v")),
        *(UnitRule(HEAD, f"{LAYER}.self_attn.{name}_proj.bias", axis=0, optional=True) for name in ("q", "k", "v")),
        UnitRule(HEAD, f"{LAYER}.self_attn.out_proj.weight", axis=1),
        UnitRule(INTERMEDIATE, f"{LAYER}.fc1.weight", axis=0),
        UnitRule(INTERMEDIATE, f"{LAYER}.fc1.bias", axis=0, optional=True),
        UnitRule(INTERMEDIATE, f"{LAYER}.fc2.weight", axis=1, reader=True),
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
        "*.self_attn_layer_norm.*",
        "*.final_layer_norm.*",
        "*.self_attn.out_proj.bias",
        "lm_head.weight",
    ),
    lm_head=("lm_head",),
)
