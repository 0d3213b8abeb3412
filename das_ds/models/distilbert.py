"""DistilBERT: BERT's layers under other names, and an LM head of four modules."""

from das_ds.functional.units import HEAD, INTERMEDIATE, OUTPUT, UnitRule
from das_ds.models.adapter import ArchitectureAdapter, GateSite

LAYER = "{base}.transformer.layer.{layer}"

DISTILBERT = ArchitectureAdapter(
    model_type="distilbert",
    objective="mlm",
    units={HEAD: "n_heads", INTERMEDIATE: "hidden_dim", OUTPUT: "dim"},
    rules=(
        *(
            UnitRule(HEAD, f"{LAYER}.attention.{name}_lin.{part}", axis=0)
            for name in ("q", "k", "v")
            for part in ("weight", "bias")
        ),
        UnitRule(HEAD, f"{LAYER}.attention.out_lin.weight", axis=1),
        UnitRule(INTERMEDIATE, f"{LAYER}.ffn.lin1.weight", axis=0),
        UnitRule(INTERMEDIATE, f"{LAYER}.ffn.lin1.bias", axis=0),
        UnitRule(INTERMEDIATE, f"{LAYER}.ffn.lin2.weight", axis=1, reader=True),
        UnitRule(OUTPUT, f"{LAYER}.ffn.lin2.weight", axis=0),
        UnitRule(OUTPUT, f"{LAYER}.ffn.lin2.bias", axis=0),
    ),
    sites=(
        GateSite(HEAD, f"{LAYER}.attention.out_lin", "input"),
        GateSite(INTERMEDIATE, f"{LAYER}.ffn.lin1", "output"),
        GateSite(OUTPUT, f"{LAYER}.ffn.lin2", "output"),
    ),
    unmasked=(
        "{base}.embeddings.*",
        "*.attention.out_lin.bias",
        "*.sa_layer_norm.*",
        "*.output_layer_norm.*",
        "vocab_transform.*",
        "vocab_layer_norm.*",
        "vocab_projector.*",
    ),
    lm_head=("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
)
