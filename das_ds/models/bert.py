"""BERT."""

from das_ds.functional.units import HEAD, INTERMEDIATE, OUTPUT, UnitRule
from das_ds.models.adapter import ArchitectureAdapter, GateSite

LAYER = "{base}.encoder.layer.{layer}"

BERT = ArchitectureAdapter(
    model_type="bert",
    objective="mlm",
    units={HEAD: "num_attention_heads", INTERMEDIATE: "intermediate_size", OUTPUT: "hidden_size"},
    rules=(
        UnitRule(HEAD, f"{LAYER}.attention.self.query.weight", axis=0),
        UnitRule(HEAD, f"{LAYER}.attention.self.query.bias", axis=0),
        UnitRule(HEAD, f"{LAYER}.attention.self.key.weight", axis=0),
        UnitRule(HEAD, f"{LAYER}.attention.self.key.bias", axis=0),
        UnitRule(HEAD, f"{LAYER}.attention.self.value.weight", axis=0),
        UnitRule(HEAD, f"{LAYER}.attention.self.value.bias", axis=0),
        UnitRule(HEAD, f"{LAYER}.attention.output.dense.weight", axis=1),
        UnitRule(INTERMEDIATE, f"{LAYER}.intermediate.dense.weight", axis=0),
        UnitRule(INTERMEDIATE, f"{LAYER}.intermediate.dense.bias", axis=0),
        UnitRule(INTERMEDIATE, f"{LAYER}.output.dense.weight", axis=1, reader=True),
        UnitRule(OUTPUT, f"{LAYER}.output.dense.weight", axis=0),
        UnitRule(OUTPUT, f"{LAYER}.output.dense.bias", axis=0),
    ),
    sites=(
        GateSite(HEAD, f"{LAYER}.attention.output.dense", "input"),
        GateSite(INTERMEDIATE, f"{LAYER}.intermediate.dense", "output"),
        GateSite(OUTPUT, f"{LAYER}.output.dense", "output"),
    ),
    unmasked=(
        "{base}.embeddings.*",
        "*.LayerNorm.weight",
        "*.LayerNorm.bias",
        "*.attention.output.dense.bias",
        "cls.predictions.*",
    ),
    lm_head=("cls",),
)
