"""Phi-3 and Phi-4: LLaMA with query, key and value in one map, and gate and up projection in another."""

from dataclasses import replace

from das_ds.functional.units import HEAD, INTERMEDIATE, UnitRule
from das_ds.models.llama import LAYER, LLAMA

PHI3 = replace(
    LLAMA,
    model_type="phi3",
    rules=(
        UnitRule(HEAD, f"{LAYER}.self_attn.qkv_proj.weight", axis=0, spread="query_key_value"),
        UnitRule(INTERMEDIATE, f"{LAYER}.mlp.gate_up_proj.weight", axis=0, spread="halves"),
        *(rule for rule in LLAMA.rules if "o_proj" in rule.parameter or "down_proj" in rule.parameter),
    ),
)
