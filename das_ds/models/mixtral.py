"""Mixtures of experts, all experts of a layer in two 3-D parameters; the intermediate units are those of each expert.

An output unit is one of the layer's sum over experts, and owns its row in every expert's down projection.
"""

from dataclasses import replace

from das_ds.functional.units import HEAD, INTERMEDIATE, OUTPUT, UnitRule
from das_ds.models.adapter import GateSite
from das_ds.models.llama import ATTENTION, ATTENTION_SITE, HEAD_NORMS, LAYER, LLAMA

EXPERTS = f"{LAYER}.mlp.experts"

MIXTRAL = replace(
    LLAMA,
    model_type="mixtral",
    units={HEAD: "num_attention_heads", INTERMEDIATE: "num_local_experts*intermediate_size", OUTPUT: "hidden_size"},
    rules=(
        *ATTENTION,
        UnitRule(INTERMEDIATE, f"{EXPERTS}.gate_up_proj", axis=0, spread="expert_halves"),
        UnitRule(INTERMEDIATE, f"{EXPERTS}.down_proj", axis=1, spread="experts", reader=True),
        UnitRule(OUTPUT, f"{EXPERTS}.down_proj", axis=0),
    ),
    sites=(
        ATTENTION_SITE,
        GateSite(INTERMEDIATE, EXPERTS, "experts"),
        GateSite(OUTPUT, EXPERTS, "output"),
    ),
    unmasked=(*LLAMA.unmasked, "*.mlp.gate.weight"),
)
QWEN3_MOE = replace(
    MIXTRAL,
    model_type="qwen3_moe",
    units={**MIXTRAL.units, INTERMEDIATE: "num_experts*moe_intermediate_size"},
    unmasked=(*MIXTRAL.unmasked, *HEAD_NORMS),
)
