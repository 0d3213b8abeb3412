"""RoBERTa: BERT's layers, its own LM head, and positions that start behind the padding index."""

from dataclasses import replace

from das_ds.models.bert import BERT

ROBERTA = replace(
    BERT,
    model_type="roberta",
    unmasked=(
        "{base}.embeddings.*",
        "*.LayerNorm.weight",
        "*.LayerNorm.bias",
        "*.attention.output.dense.bias",
        "lm_head.*",
    ),
    lm_head=("lm_head",),
    position_offset=2,
)
XLM_ROBERTA = replace(ROBERTA, model_type="xlm-roberta")
