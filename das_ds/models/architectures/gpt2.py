"""GPT-2: fused query, key and value projection; weights stored as (inputs, outputs), so that outputs are columns."""

from das_ds.functional.units import HEAD, INTERMEDIATE, OUTPUT, UnitRule
from das_ds.models.architectures.spec import ArchitectureSpec, GateSite

LAYER = "{base}.h.{layer}"

GPT2 = ArchitectureSpec(
    model_type="gpt2",
    objective="clm",
    units={HEAD: "n_head", INTERMEDIATE: "n_inner|4*n_embd", OUTPUT: "n_embd"},
    rules=(
        UnitRule(HEAD, f"{LAYER}.attn.c_attn.weight", axis=1, layout="qkv"),
        UnitRule(HEAD, f"{LAYER}.attn.c_attn.bias", axis=0, layout="qkv"),
        UnitRule(HEAD, f"{LAYER}.attn.c_proj.weight", axis=0),
        UnitRule(INTERMEDIATE, f"{LAYER}.mlp.c_fc.weight", axis=1),
        UnitRule(INTERMEDIATE, f"{LAYER}.mlp.c_fc.bias", axis=0),
        UnitRule(INTERMEDIATE, f"{LAYER}.mlp.c_proj.weight", axis=0, consumer=True),
        UnitRule(OUTPUT, f"{LAYER}.mlp.c_proj.weight", axis=1),
        UnitRule(OUTPUT, f"{LAYER}.mlp.c_proj.bias", axis=0),
    ),
    sites=(
        GateSite(HEAD, f"{LAYER}.attn.c_proj", "input"),
        GateSite(INTERMEDIATE, f"{LAYER}.mlp.c_fc", "output"),
        GateSite(OUTPUT, f"{LAYER}.mlp.c_proj", "output"),
    ),
    unmasked=(
        "{base}.wte.weight",
        "{base}.wpe.weight",
        f"{LAYER}.attn.c_proj.bias",
        f"{LAYER}.ln_1.*",
        f"{LAYER}.ln_2.*",
        "{base}.ln_f.*",
        "lm_head.weight",
    ),
    lm_head=("lm_head",),
    embeddings=("{base}.wte.weight", "{base}.wpe.weight"),
)
