"""Hidden matrices of networks, against the layers that PEFT decomposes by default, and against parameters by name."""

from __future__ import annotations

import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_OSF_TARGET_MODULES_MAPPING

from das_ds.models.architectures.registry import spec_for
from das_ds.softmask.hidden_matrices import HiddenMatrix, find_hidden_matrices
from das_ds.softmask.masked_matrix import MaskedMatrix
from helpers.tiny_models import tiny_model


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "opt"])
def test_hidden_matrices_are_targets_of_peft(model_type: str) -> None:
    model = tiny_model(model_type)
    targets = TRANSFORMERS_MODELS_TO_OSF_TARGET_MODULES_MAPPING[model_type]
    expected = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and name.split(".")[-2] in targets
    }
    found = find_hidden_matrices(spec_for(model_type).layout(model))
    assert {matrix.name: (matrix.num_rows, matrix.num_columns) for matrix in found} == expected
    assert all(matrix.start == 0 and matrix.parameter == matrix.name for matrix in found)


def test_hidden_matrices_are_as_stored_where_transposed() -> None:
    """Those of mini_trainer: PEFT leaves out `c_fc`."""
    found = find_hidden_matrices(spec_for("gpt2").layout(tiny_model("gpt2")))
    layer = {m.name.removeprefix("transformer.h.0."): (m.num_rows, m.num_columns) for m in found if ".h.0." in m.name}
    assert layer == {
        "attn.c_attn.weight": (24, 72),
        "attn.c_proj.weight": (24, 24),
        "mlp.c_fc.weight": (24, 40),
        "mlp.c_proj.weight": (40, 24),
    }


def test_hidden_matrices_of_experts_are_those_of_each() -> None:
    model = tiny_model("mixtral")
    found = [
        m
        for m in find_hidden_matrices(spec_for("mixtral").layout(model))
        if m.parameter.startswith("model.layers.1.mlp")
    ]
    parameters = dict(model.named_parameters())
    assert len(found) == 8 and not any(".gate." in matrix.parameter for matrix in found)
    for number, matrix in enumerate(found):
        stacked = parameters[matrix.parameter]
        expert = number % 4
        assert matrix.name == f"{matrix.parameter}[{expert}]"
        values = stacked.flatten()[matrix.start : matrix.start + matrix.numel]
        assert torch.equal(values.view(matrix.num_rows, matrix.num_columns), stacked[expert])


def test_hidden_matrix_as_vector_is_one_row() -> None:
    matrix = HiddenMatrix("w[2]", "w", 30, 3, 5)
    assert matrix.as_vector() == MaskedMatrix("w[2]", "w", 30, 1, 15, "w[2]")
