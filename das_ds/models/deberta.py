"""DeBERTa-v2 and v3: BERT's layers with disentangled attention, whose position projections belong to the heads too."""

from dataclasses import replace

from das_ds.functional.units import HEAD, UnitRule
from das_ds.models.bert import BERT, LAYER

POSITIONS = ("pos_query_proj", "pos_key_proj")
"""Absent where a config shares the content projections (share_att_key) or has no relative attention."""

DEBERTA_V2 = replace(
    BERT,
    model_type="deberta-v2",
    rules=(
        *(
            UnitRule(HEAD, f"{LAYER}.attention.self.{name}.{part}", axis=0)
            for name in ("query_proj", "key_proj", "value_proj")
            for part in ("weight", "bias")
        ),
        *(
            UnitRule(HEAD, f"{LAYER}.attention.self.{name}.{part}", axis=0, optional=True)
            for name in POSITIONS
            for part in ("weight", "bias")
        ),
        *(rule for rule in BERT.rules if ".attention.self." not in rule.parameter),
    ),
    unmasked=(
        "{base}.embeddings.*",
        "{base}.encoder.rel_embeddings.weight",
        "{base}.encoder.LayerNorm.*",
        "{base}.encoder.conv.*",
        "*.output.LayerNorm.*",
        "*.attention.output.dense.bias",
        "cls.predictions.*",
    ),
)
