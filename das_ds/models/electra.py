"""ELECTRA's generator: BERT's layers behind embeddings of another width."""

from dataclasses import replace

from das_ds.models.bert import BERT

ELECTRA = replace(
    BERT,
    model_type="electra",
    unmasked=(
        "{base}.embeddings.*",
        "{base}.embeddings_project.*",
        "*.LayerNorm.weight",
        "*.LayerNorm.bias",
        "*.attention.output.dense.bias",
        "generator_predictions.*",
        "generator_lm_head.*",
    ),
    lm_head=("generator_predictions", "generator_lm_head"),
)
