"""Llama and its relatives: separate projections, grouped-query attention, gated MLPs.

They differ in biases, whose rules are optional, and in norms:

* Norms over a head's queries and keys (Qwen3, Gemma 3) are shared by all heads and stay unmasked; those of OLMo 2 have
  one entry per row of W_q and W_k, which scales only that row and belongs to its head.
* A norm after the MLP (OLMo 2, Gemma 2 and 3) has one entry per output unit, which reads only that unit.
"""

from dataclasses import replace

from das_ds.functional.units import HEAD, INTERMEDIATE, OUTPUT, UnitRule
from das_ds.models.architectures.spec import ArchitectureSpec, GateSite

LAYER = "{base}.layers.{layer}"
ATTENTION_RULES = (
    UnitRule(HEAD, f"{LAYER}.self_attn.q_proj.weight", axis=0),
    UnitRule(HEAD, f"{LAYER}.self_attn.q_proj.bias", axis=0, optional=True),
    UnitRule(HEAD, f"{LAYER}.self_attn.k_proj.weight", axis=0, layout="kv"),
    UnitRule(HEAD, f"{LAYER}.self_attn.k_proj.bias", axis=0, layout="kv", optional=True),
    UnitRule(HEAD, f"{LAYER}.self_attn.v_proj.weight", axis=0, layout="kv"),
    UnitRule(HEAD, f"{LAYER}.self_attn.v_proj.bias", axis=0, layout="kv", optional=True),
    UnitRule(HEAD, f"{LAYER}.self_attn.o_proj.weight", axis=1),
)
ATTENTION_SITE = GateSite(HEAD, f"{LAYER}.self_attn.o_proj", "input")
UNMASKED = (
    "{base}.embed_tokens.weight",
    f"{LAYER}.self_attn.o_proj.bias",
    f"{LAYER}.post_attention_layernorm.weight",
    "{base}.norm.weight",
    "lm_head.weight",
)
PRE_NORM = f"{LAYER}.input_layernorm.weight"
POST_NORM = f"{LAYER}.post_feedforward_layernorm.weight"
SHARED_HEAD_NORMS = (f"{LAYER}.self_attn.q_norm.weight", f"{LAYER}.self_attn.k_norm.weight")
POST_NORM_RULE = UnitRule(OUTPUT, POST_NORM, axis=0, consumer=True)

LLAMA = ArchitectureSpec(
    model_type="llama",
    objective="clm",
    units={HEAD: "num_attention_heads", INTERMEDIATE: "intermediate_size", OUTPUT: "hidden_size"},
    rules=(
        *ATTENTION_RULES,
        UnitRule(INTERMEDIATE, f"{LAYER}.mlp.gate_proj.weight", axis=0),
        UnitRule(INTERMEDIATE, f"{LAYER}.mlp.gate_proj.bias", axis=0, optional=True),
        UnitRule(INTERMEDIATE, f"{LAYER}.mlp.up_proj.weight", axis=0),
        UnitRule(INTERMEDIATE, f"{LAYER}.mlp.up_proj.bias", axis=0, optional=True),
        UnitRule(INTERMEDIATE, f"{LAYER}.mlp.down_proj.weight", axis=1, consumer=True),
        UnitRule(OUTPUT, f"{LAYER}.mlp.down_proj.weight", axis=0),
        UnitRule(OUTPUT, f"{LAYER}.mlp.down_proj.bias", axis=0, optional=True),
    ),
    sites=(
        ATTENTION_SITE,
        GateSite(INTERMEDIATE, f"{LAYER}.mlp.down_proj", "input"),
        GateSite(OUTPUT, f"{LAYER}.mlp.down_proj", "output"),
    ),
    unmasked=(*UNMASKED, PRE_NORM),
    lm_head=("lm_head",),
    embeddings=("{base}.embed_tokens.weight",),
    key_value_heads="num_key_value_heads",
)
MISTRAL = replace(LLAMA, model_type="mistral")
QWEN2 = replace(LLAMA, model_type="qwen2")
QWEN3 = replace(LLAMA, model_type="qwen3", unmasked=(*LLAMA.unmasked, *SHARED_HEAD_NORMS))
OLMO2 = replace(
    LLAMA,
    model_type="olmo2",
    rules=(
        *LLAMA.rules,
        UnitRule(HEAD, f"{LAYER}.self_attn.q_norm.weight", axis=0),
        UnitRule(HEAD, f"{LAYER}.self_attn.k_norm.weight", axis=0, layout="kv"),
        POST_NORM_RULE,
    ),
    unmasked=(*UNMASKED, POST_NORM),
)
GEMMA2 = replace(
    LLAMA,
    model_type="gemma2",
    rules=(*LLAMA.rules, POST_NORM_RULE),
    unmasked=(*UNMASKED, PRE_NORM, f"{LAYER}.pre_feedforward_layernorm.weight", POST_NORM),
    logit_cap_attribute="final_logit_softcapping",
)
GEMMA3_TEXT = replace(GEMMA2, model_type="gemma3_text", unmasked=(*GEMMA2.unmasked, *SHARED_HEAD_NORMS))
