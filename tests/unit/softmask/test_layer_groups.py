"""Kinds of layers that read an input, for every architecture, and for adapters."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from das_ds.config import LoraConfig
from das_ds.models.architectures.registry import ARCHITECTURES, spec_for
from das_ds.models.lora import Lora
from das_ds.softmask.layer_groups import (
    ADAPTER,
    ATTENTION_INPUT,
    ATTENTION_OUTPUT,
    LAYER_GROUPS,
    MLP_INPUT,
    MLP_OUTPUT,
    OTHER,
    layer_groups,
)
from das_ds.softmask.linear_inputs import find_masked_matrices
from das_ds.softmask.masked_matrix import MaskedMatrix
from helpers.fake_run import make_run
from helpers.tiny_models import tiny_model

METHOD = {"name": "directions"}
IN_A_LAYER = LAYER_GROUPS[:4]


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
def test_layer_groups_every_architecture_has_each_kind_in_each_layer(model_type: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, METHOD, model_type)
    matrices = find_masked_matrices(run)
    groups = layer_groups(matrices, run.layout)
    assert groups.keys() == {matrix.input for matrix in matrices}
    assert list(groups.values()) == sorted(groups.values(), key=LAYER_GROUPS.index)
    counts = Counter(groups.values())
    num_layers = run.layout.num_layers
    for group in IN_A_LAYER:
        # Experts have inputs of their own.
        assert counts[group] >= num_layers and counts[group] % num_layers == 0, (group, counts)
    assert ADAPTER not in counts


def test_layer_groups_roberta_by_name(tmp_path: Path) -> None:
    run = make_run(tmp_path, METHOD)
    matrices = find_masked_matrices(run)
    groups = layer_groups(matrices, run.layout)
    layer = "roberta.encoder.layer.1"
    expected = {
        f"{layer}.attention.self.value.weight": ATTENTION_INPUT,
        f"{layer}.attention.output.dense.weight": ATTENTION_OUTPUT,
        f"{layer}.intermediate.dense.weight": MLP_INPUT,
        f"{layer}.output.dense.weight": MLP_OUTPUT,
        "lm_head.dense.weight": OTHER,
    }
    found = {matrix.name: groups[matrix.input] for matrix in matrices}
    assert {name: found[name] for name in expected} == expected
    assert Counter(groups.values())[OTHER] == 2


@pytest.mark.parametrize("model_type", ["roberta", "gpt2"])
def test_layer_groups_adapters_belong_to_the_layer_that_they_adapt(model_type: str) -> None:
    model = tiny_model(model_type)
    layout = spec_for(model_type).layout(model)
    lora = Lora.plan(model, layout, LoraConfig(rank=2))
    matrices = [
        MaskedMatrix(name, name, 0, *shape[1:], name) for item in lora.linears for name, shape in item.shapes.items()
    ]
    groups = layer_groups(matrices, lora.layout(layout), lora)
    plain = layer_groups(
        [
            MaskedMatrix(item.weight, item.weight, 0, item.num_outputs, item.num_inputs, item.weight, item.transposed)
            for item in lora.linears
        ],
        layout,
    )
    assert set(plain.values()) == set(IN_A_LAYER)
    for item in lora.linears:
        assert groups[item.a] == plain[item.weight] and groups[item.b] == ADAPTER


def test_layer_groups_input_of_two_kinds_is_that_of_the_first() -> None:
    layout = spec_for("roberta").layout(tiny_model())
    names = (
        "lm_head.dense.weight",
        "roberta.encoder.layer.0.intermediate.dense.weight",
        "roberta.encoder.layer.0.attention.self.key.weight",
    )
    matrices = [MaskedMatrix(name, name, 0, 2, 2, "x") for name in names]
    assert layer_groups(matrices, layout) == {"x": ATTENTION_INPUT}
    assert layer_groups(matrices[:2], layout) == {"x": MLP_INPUT}
