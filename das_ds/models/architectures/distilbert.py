"""DistilBERT: BERT's layers under other names, and an LM head whose modules are attributes of the model."""

from das_ds.functional.units import HEAD, INTERMEDIATE, OUTPUT, UnitRule
from das_ds.models.architectures.spec import ArchitectureSpec, GateSite

LAYER = "{base}.transformer.layer.{layer}"
EMBEDDINGS = (
    "{base}.embeddings.word_embeddings.weight",
    "{base}.embeddings.position_embeddings.weight",
    "{base}.embeddings.LayerNorm.*",
)

DISTILBERT = ArchitectureSpec(
    model_type="distilbert",
    objective="mlm",
    units={HEAD: "n_heads", INTERMEDIATE: "hidden_dim", OUTPUT: "dim"},
    rules=(
        UnitRule(HEAD, f"{LAYER}.attention.q_lin.weight", axis=0),
        UnitRule(HEAD, f"{LAYER}.attention.q_lin.bias", axis=0),
        UnitRule(HEAD, f"{LAYER}.attention.k_lin.weight", axis=0),
        UnitRule(HEAD, f"{LAYER}.attention.k_lin.bias", axis=0),
        UnitRule(HEAD, f"{LAYER}.attention.v_lin.weight", axis=0),
        UnitRule(HEAD, f"{LAYER}.attention.v_lin.bias", axis=0),
        UnitRule(HEAD, f"{LAYER}.attention.out_lin.weight", axis=1),
        UnitRule(INTERMEDIATE, f"{LAYER}.ffn.lin1.weight", axis=0),
        UnitRule(INTERMEDIATE, f"{LAYER}.ffn.lin1.bias", axis=0),
        UnitRule(INTERMEDIATE, f"{LAYER}.ffn.lin2.weight", axis=1, consumer=True),
        UnitRule(OUTPUT, f"{LAYER}.ffn.lin2.weight", axis=0),
        UnitRule(OUTPUT, f"{LAYER}.ffn.lin2.bias", axis=0),
    ),
    sites=(
        GateSite(HEAD, f"{LAYER}.attention.out_lin", "input"),
        GateSite(INTERMEDIATE, f"{LAYER}.ffn.lin1", "output"),
        GateSite(OUTPUT, f"{LAYER}.ffn.lin2", "output"),
    ),
    unmasked=(
        *EMBEDDINGS,
        f"{LAYER}.attention.out_lin.bias",
        f"{LAYER}.sa_layer_norm.*",
        f"{LAYER}.output_layer_norm.*",
        "vocab_transform.*",
        "vocab_layer_norm.*",
        "vocab_projector.*",
    ),
    lm_head=("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
    embeddings=EMBEDDINGS,
)
