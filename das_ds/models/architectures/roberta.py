"""RoBERTa and XLM-RoBERTa: BERT's layers, another LM head, and positions that start after the padding index."""

from dataclasses import replace

from das_ds.models.architectures.bert import BERT, EMBEDDINGS, LAYER_UNMASKED

ROBERTA = replace(
    BERT,
    model_type="roberta",
    unmasked=(*EMBEDDINGS, *LAYER_UNMASKED, "lm_head.*"),
    lm_head=("lm_head",),
    position_offset="pad_token_id",
)
XLM_ROBERTA = replace(ROBERTA, model_type="xlm-roberta")
