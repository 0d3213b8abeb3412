"""DeBERTa v2 and v3: BERT's layers, attention to relative positions, and two kinds of LM head.

If relative positions have separate query and key projections, a head owns its rows of those too.
"""

from dataclasses import replace

from das_ds.functional.units import HEAD, INTERMEDIATE, OUTPUT, UnitRule
from das_ds.models.architectures.bert import BERT, EMBEDDINGS, LAYER, LAYER_UNMASKED

# Relative positions, which all layers read, and a convolution over the embeddings beside the first layer are here, too.
ALL_EMBEDDINGS = (
    *EMBEDDINGS,
    "{base}.embeddings.embed_proj.weight",
    "{base}.encoder.rel_embeddings.weight",
    "{base}.encoder.LayerNorm.*",
    "{base}.encoder.conv.conv.*",
    "{base}.encoder.conv.LayerNorm.*",
)
DEBERTA_V2 = replace(
    BERT,
    model_type="deberta-v2",
    rules=(
        UnitRule(HEAD, f"{LAYER}.attention.self.query_proj.weight", axis=0),
        UnitRule(HEAD, f"{LAYER}.attention.self.query_proj.bias", axis=0),
        UnitRule(HEAD, f"{LAYER}.attention.self.key_proj.weight", axis=0),
        UnitRule(HEAD, f"{LAYER}.attention.self.key_proj.bias", axis=0),
        UnitRule(HEAD, f"{LAYER}.attention.self.value_proj.weight", axis=0),
        UnitRule(HEAD, f"{LAYER}.attention.self.value_proj.bias", axis=0),
        UnitRule(HEAD, f"{LAYER}.attention.self.pos_key_proj.weight", axis=0, optional=True),
        UnitRule(HEAD, f"{LAYER}.attention.self.pos_key_proj.bias", axis=0, optional=True),
        UnitRule(HEAD, f"{LAYER}.attention.self.pos_query_proj.weight", axis=0, optional=True),
        UnitRule(HEAD, f"{LAYER}.attention.self.pos_query_proj.bias", axis=0, optional=True),
        *(
            rule
            for rule in BERT.rules
            if rule.group in (INTERMEDIATE, OUTPUT) or rule.parameter.endswith("attention.output.dense.weight")
        ),
    ),
    unmasked=(
        *ALL_EMBEDDINGS,
        *LAYER_UNMASKED,
        "cls.predictions.*",
        "lm_predictions.lm_head.*",
    ),
    embeddings=ALL_EMBEDDINGS,
    embedding_head="lm_predictions",
)
