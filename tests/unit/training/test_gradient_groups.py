"""Groups of parameters whose gradient norms are logged."""

from __future__ import annotations

import pytest

from das_ds.models.architectures.registry import spec_for
from das_ds.training.gradient_groups import gradient_groups
from helpers.tiny_models import tiny_model

EXPECTED = {
    "bert": {
        "bert.embeddings.word_embeddings.weight": "embeddings",
        "bert.embeddings.position_embeddings.weight": "other",
        "bert.encoder.layer.0.attention.self.query.weight": "attention",
        "bert.encoder.layer.0.attention.output.dense.weight": "attention",
        "bert.encoder.layer.0.intermediate.dense.bias": "mlp",
        "bert.encoder.layer.0.output.dense.weight": "mlp",
        "bert.encoder.layer.0.output.LayerNorm.weight": "normalization",
        "cls.predictions.transform.dense.weight": "other",
    },
    "llama": {
        "model.embed_tokens.weight": "embeddings",
        "model.layers.1.self_attn.k_proj.weight": "attention",
        "model.layers.1.self_attn.o_proj.weight": "attention",
        "model.layers.1.mlp.down_proj.weight": "mlp",
        "model.norm.weight": "normalization",
    },
    "mixtral": {
        "model.layers.0.mlp.gate.weight": "other",
        "model.layers.0.mlp.experts.down_proj": "mlp",
    },
}


@pytest.mark.parametrize("model_type", EXPECTED)
def test_parameters_are_grouped_by_what_owns_them(model_type: str) -> None:
    model = tiny_model(model_type)
    groups = gradient_groups(spec_for(model_type).layout(model))
    assert set(groups) == {name for name, _ in model.named_parameters()}
    assert {name: groups[name] for name in EXPECTED[model_type]} == EXPECTED[model_type]
