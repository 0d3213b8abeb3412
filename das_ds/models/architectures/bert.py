"""BERT, and ELECTRA's generator, which has BERT's layers."""

from dataclasses import replace

from das_ds.functional.units import HEAD, INTERMEDIATE, OUTPUT, UnitRule
from das_ds.models.architectures.spec import ArchitectureSpec, GateSite

LAYER = "{base}.encoder.layer.{layer}"
EMBEDDINGS = (
    "{base}.embeddings.word_embeddings.weight",
    "{base}.embeddings.position_embeddings.weight",
    "{base}.embeddings.token_type_embeddings.weight",
    "{base}.embeddings.LayerNorm.*",
)
LAYER_UNMASKED = (
    f"{LAYER}.attention.output.dense.bias",
    f"{LAYER}.attention.output.LayerNorm.*",
    f"{LAYER}.output.LayerNorm.*",
)

BERT = ArchitectureSpec(
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
        UnitRule(INTERMEDIATE, f"{LAYER}.output.dense.weight", axis=1, consumer=True),
        UnitRule(OUTPUT, f"{LAYER}.output.dense.weight", axis=0),
        UnitRule(OUTPUT, f"{LAYER}.output.dense.bias", axis=0),
    ),
    sites=(
        GateSite(HEAD, f"{LAYER}.attention.output.dense", "input"),
        GateSite(INTERMEDIATE, f"{LAYER}.intermediate.dense", "output"),
        GateSite(OUTPUT, f"{LAYER}.output.dense", "output"),
    ),
    unmasked=(*EMBEDDINGS, *LAYER_UNMASKED, "cls.predictions.*"),
    lm_head=("cls",),
    embeddings=EMBEDDINGS,
)

ELECTRA = replace(
    BERT,
    model_type="electra",
    unmasked=(
        *EMBEDDINGS,
        "{base}.embeddings_project.*",
        *LAYER_UNMASKED,
        "generator_predictions.*",
        "generator_lm_head.*",
    ),
    lm_head=("generator_predictions", "generator_lm_head"),
    embeddings=(*EMBEDDINGS, "{base}.embeddings_project.*"),
)
