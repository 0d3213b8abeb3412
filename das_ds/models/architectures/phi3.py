"""Phi-3: Llama with fused query, key and value projection, and fused gate and up projection."""

from dataclasses import replace

from das_ds.functional.units import HEAD, INTERMEDIATE, OUTPUT, UnitRule
from das_ds.models.architectures.llama import LAYER, LLAMA

PHI3 = replace(
    LLAMA,
    model_type="phi3",
    rules=(
        UnitRule(HEAD, f"{LAYER}.self_attn.qkv_proj.weight", axis=0, layout="qkv"),
        UnitRule(HEAD, f"{LAYER}.self_attn.o_proj.weight", axis=1),
        UnitRule(INTERMEDIATE, f"{LAYER}.mlp.gate_up_proj.weight", axis=0, layout="gate_up"),
        UnitRule(INTERMEDIATE, f"{LAYER}.mlp.down_proj.weight", axis=1, consumer=True),
        UnitRule(OUTPUT, f"{LAYER}.mlp.down_proj.weight", axis=0),
    ),
    # The config also has `embd_pdrop`, which the network does not use.
    dropouts=("attention_dropout", "resid_pdrop"),
)
