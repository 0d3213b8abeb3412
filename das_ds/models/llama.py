"""Decoders with rotary positions, grouped-query attention and a gated MLP: LLaMA and those built like it."""

from dataclasses import replace

from das_ds.functional.units import HEAD, INTERMEDIATE, OUTPUT, UnitRule
from das_ds.models.adapter import ArchitectureAdapter, GateSite

LAYER = "{base}.layers.{layer}"
ATTENTION = (
    UnitRule(HEAD, f"{LAYER}.self_attn.q_proj.weight", axis=0),
    UnitRule(HEAD, f"{LAYER}.self_attn.q_proj.bias", axis=0, optional=True),
    UnitRule(HEAD, f"{LAYER}.self_attn.k_proj.weight", axis=0, spread="key_value"),
    UnitRule(HEAD, f"{LAYER}.self_attn.k_proj.bias", axis=0, spread="key_value", optional=True),
    UnitRule(HEAD, f"{LAYER}.self_attn.v_proj.weight", axis=0, spread="key_value"),
    UnitRule(HEAD, f"{LAYER}.self_attn.v_proj.bias", axis=0, spread="key_value", optional=True),
    UnitRule(HEAD, f"{LAYER}.self_attn.o_proj.weight", axis=1),
)
ATTENTION_SITE = GateSite(HEAD, f"{LAYER}.self_attn.o_proj", "input")

LLAMA = ArchitectureAdapter(
    model_type="llama",
    objective="clm",
    units={HEAD: "num_attention_heads", INTERMEDIATE: "intermediate_size", OUTPUT: "hidden_size"},
    rules=(
        *ATTENTION,
        UnitRule(INTERMEDIATE, f"{LAYER}.mlp.gate_proj.weight", axis=0),
        UnitRule(INTERMEDIATE, f"{LAYER}.mlp.gate_proj.bias", axis=0, optional=True),
        UnitRule(INTERMEDIATE, f"{LAYER}.mlp.up_proj.weight", axis=0),
        UnitRule(INTERMEDIATE, f"{LAYER}.mlp.up_proj.bias", axis=0, optional=True),
        UnitRule(INTERMEDIATE, f"{LAYER}.mlp.down_proj.weight", axis=1, reader=True),
        UnitRule(OUTPUT, f"{LAYER}.mlp.down_proj.weight", axis=0),
        UnitRule(OUTPUT, f"{LAYER}.mlp.down_proj.bias", axis=0, optional=True),
    ),
    sites=(
        ATTENTION_SITE,
        GateSite(INTERMEDIATE, f"{LAYER}.mlp.down_proj", "input"),
        GateSite(OUTPUT, f"{LAYER}.mlp.down_proj", "output"),
    ),
    unmasked=(
        "{base}.embed_tokens.weight",
        "*.input_layernorm.weight",
        "*.post_attention_layernorm.weight",
        "*.self_attn.o_proj.bias",
        "{base}.norm.weight",
        "lm_head.weight",
    ),
    lm_head=("lm_head",),
    key_value_heads="num_key_value_heads",
)
MISTRAL = replace(LLAMA, model_type="mistral")
QWEN2 = replace(LLAMA, model_type="qwen2")
# One norm for the entries of a head, shared by all heads: no head owns any of it.
HEAD_NORMS = ("*.self_attn.q_norm.weight", "*.self_attn.k_norm.weight")
QWEN3 = replace(LLAMA, model_type="qwen3", unmasked=(*LLAMA.unmasked, *HEAD_NORMS))
MLP_NORMS = ("*.pre_feedforward_layernorm.weight", "*.post_feedforward_layernorm.weight")
# An entry of the norm behind the MLP scales one output and nothing else: it reads that unit.
NORM_READER = UnitRule(OUTPUT, f"{LAYER}.post_feedforward_layernorm.weight", axis=0, reader=True)
GEMMA2 = replace(
    LLAMA,
    model_type="gemma2",
    rules=(*LLAMA.rules, NORM_READER),
    unmasked=(*LLAMA.unmasked, *MLP_NORMS),
    logit_cap_attribute="final_logit_softcapping",
)
GEMMA3 = replace(GEMMA2, model_type="gemma3_text", unmasked=(*GEMMA2.unmasked, *HEAD_NORMS))
# These norms have an entry for each row of the projections, which scales what a head's rows give and nothing else.
OLMO2 = replace(
    LLAMA,
    model_type="olmo2",
    rules=(
        *LLAMA.rules,
        UnitRule(HEAD, f"{LAYER}.self_attn.q_norm.weight", axis=0),
        UnitRule(HEAD, f"{LAYER}.self_attn.k_norm.weight", axis=0, spread="key_value"),
        NORM_READER,
    ),
    unmasked=(*LLAMA.unmasked, "*.post_feedforward_layernorm.weight"),
)
