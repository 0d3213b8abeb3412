"""Every trained matrix of every architecture is found, where it lies, and with the input that it reads."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from das_ds.config import LoraConfig
from das_ds.data.batch import Batch
from das_ds.errors import ModelError
from das_ds.models.architectures.registry import ARCHITECTURES, spec_for
from das_ds.models.find_readers import find_readers
from das_ds.models.language_model import LanguageModel
from das_ds.models.matrix_readers import LinearReader, StoredMatrix
from das_ds.softmask.layer_inputs import InputKind, LayerInputs, trace_without_values
from helpers.tiny_models import tiny_model
from helpers.traced_inputs import CONVOLUTION, NETWORKS, Traced, padded_batch, traced

TABLES = (
    "embed_in.weight",
    "embed_positions.weight",
    "embed_tokens.weight",
    "position_embeddings.weight",
    "rel_embeddings.weight",
    "token_type_embeddings.weight",
    "wpe.weight",
    "wte.weight",
)
"""Ends of the names of embeddings: their rows are taken from a table and multiplied by nothing."""


@cache
def network(name: str) -> Traced:
    model_type, changes = NETWORKS[name]
    return traced(model_type, **changes)


def test_networks_every_architecture_is_among_them() -> None:
    assert {model_type for model_type, _ in NETWORKS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", NETWORKS)
def test_trace_every_matrix_is_masked_once_or_a_table(name: str) -> None:
    run = network(name)
    places: dict[str, list[range]] = {}
    for matrix in run.layers.matrices:
        places.setdefault(matrix.parameter, []).append(range(matrix.start, matrix.start + matrix.numel))
    for parameter, ranges in places.items():
        covered = sorted(element for own in ranges for element in own)
        assert covered == list(range(run.parameters[parameter].numel())), parameter
    others = {n for n, p in run.parameters.items() if p.dim() > 1 and n not in places}
    assert all(other.endswith(TABLES) for other in others), others


@pytest.mark.parametrize("name", NETWORKS)
def test_trace_on_meta_device_is_the_same(name: str) -> None:
    model_type, changes = NETWORKS[name]
    with torch.device("meta"):
        model = tiny_model(model_type, **changes)
    meta = trace_without_values(
        LanguageModel(model, spec_for(model_type)), find_readers(model, dict(model.named_parameters()))
    )
    assert meta.matrices == network(name).layers.matrices
    assert meta.kinds == network(name).layers.kinds


def groups(run: Traced) -> set[frozenset[str]]:
    """Names of matrices of the last layer that read one input of it."""
    found: dict[str, set[str]] = {}
    for matrix in run.layers.matrices:
        _, separator, name = matrix.name.partition(".1.")
        if separator and ".pos_" not in name:
            found.setdefault(matrix.input, set()).add(name.removesuffix(".weight"))
    return {frozenset(names) for names in found.values()}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "roberta",
            "attention.self.query attention.self.key attention.self.value|attention.output.dense|intermediate.dense"
            "|output.dense",
        ),
        (
            "llama",
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj|self_attn.o_proj|mlp.gate_proj mlp.up_proj"
            "|mlp.down_proj",
        ),
        # Queries and keys read the table of relative positions as well, values do not.
        (
            "deberta-v2",
            "attention.self.query_proj attention.self.key_proj|attention.self.value_proj|attention.output.dense"
            "|intermediate.dense|output.dense",
        ),
        # Projections of their own for the table.
        (
            "deberta-v2, convolution and newer head",
            "attention.self.query_proj attention.self.key_proj attention.self.value_proj"
            "|attention.output.dense|intermediate.dense|output.dense",
        ),
        ("gpt2", "attn.c_attn|attn.c_proj|mlp.c_fc|mlp.c_proj"),
        (
            "mixtral",
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj|self_attn.o_proj|mlp.gate"
            + "".join(f"|mlp.experts.gate_up_proj[{e}]|mlp.experts.down_proj[{e}]" for e in range(4)),
        ),
    ],
)
def test_trace_matrices_share_the_input_that_they_read(name: str, expected: str) -> None:
    assert groups(network(name)) == {frozenset(names.split()) for names in expected.split("|")}


def test_trace_projections_of_a_table_share_it_in_all_layers() -> None:
    run = network("deberta-v2, convolution and newer head")
    projections = {m.input for m in run.layers.matrices if ".pos_" in m.name}
    assert projections == {"deberta.encoder.layer.0.attention.self.pos_key_proj.weight"}
    assert run.layers.kinds[projections.pop()] == [InputKind.TABLE]


def test_trace_lora_matrices_that_adapt_one_input_share_it(tmp_path: Path) -> None:
    targets = ["query", "key", "value", "intermediate.dense"]
    run = traced("roberta", LoraConfig(rank=2, target_modules=targets), tmp_path)
    base = "roberta.encoder.layer.1.attention.self"
    a = [run.matrices[f"{base}.{name}.lora_A.default.weight"] for name in ("query", "key", "value")]
    b = [run.matrices[f"{base}.{name}.lora_B.default.weight"] for name in ("query", "key", "value")]
    assert {matrix.input for matrix in a} == {a[0].name}
    assert [matrix.input for matrix in b] == [matrix.name for matrix in b]
    assert (a[0].num_outputs, a[0].width, b[0].num_outputs, b[0].width) == (2, 24, 24, 2)
    assert {m.parameter for m in run.layers.matrices} == set(run.parameters)


def test_trace_lora_in_float32_on_bf16_weights_shares_inputs(tmp_path: Path) -> None:
    """Each adapter converts the input for itself, into memory of its own."""
    config = LoraConfig(rank=2, target_modules=["query", "key", "value"], dropout=0.1)
    run = traced("roberta", config, tmp_path)
    for parameter in run.model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else torch.bfloat16)
    found = LayerInputs.trace(find_readers(run.model, run.parameters, run.lora), run.run)
    assert found.matrices == run.layers.matrices
    a = [m for m in found.matrices if ".lora_A." in m.name]
    assert len({matrix.input for matrix in a}) == len(a) / 3 == 2


def test_trace_lora_of_conv1d_is_not_transposed(tmp_path: Path) -> None:
    run = traced("gpt2", LoraConfig(rank=2, target_modules=["c_attn"]), tmp_path)
    a, b = (run.matrices[f"transformer.h.1.attn.c_attn.lora_{side}.default.weight"] for side in "AB")
    assert [(m.num_outputs, m.width, m.transposed) for m in (a, b)] == [(2, 24, False), (72, 2, False)]


def test_trace_shapes_orientation_and_grouped_queries() -> None:
    conv1d = network("gpt2").matrices["transformer.h.0.attn.c_attn.weight"]
    assert (conv1d.num_outputs, conv1d.width, conv1d.transposed) == (72, 24, True)
    llama = network("llama").matrices
    key = llama["model.layers.1.self_attn.k_proj.weight"]
    assert (key.num_outputs, key.width, key.input) == (16, 24, "model.layers.1.self_attn.q_proj.weight")
    expert = network("qwen3_moe").matrices["model.layers.1.mlp.experts.down_proj[3]"]
    assert (expert.start, expert.num_outputs, expert.width) == (3 * 24 * 16, 24, 16)
    # Two groups of twelve channels, windows of three positions.
    groups_of_convolution = [
        network("deberta-v2, convolution and newer head").matrices[f"deberta.encoder.conv.conv.weight[{g}]"]
        for g in range(CONVOLUTION["conv_groups"])
    ]
    assert [(m.start, m.num_outputs, m.width) for m in groups_of_convolution] == [(0, 12, 36), (12 * 36, 12, 36)]


# Toy networks: `forward` calls the layers a and b of width 4.


def trace_toy(
    forward: Callable[[nn.Linear, nn.Linear, torch.Tensor], object], *, shared: bool = False
) -> dict[str, str]:
    """Matrix -> its input."""
    a = nn.Linear(4, 4)
    b = nn.Linear(4, 4)
    readers = [
        LinearReader(module, (StoredMatrix("a" if shared else name, None, 4, 4),))
        for name, module in (("a", a), ("b", b))
    ]

    def run_network(batch: Batch) -> None:
        with torch.no_grad():
            forward(a, b, torch.randn(*batch.input_ids.shape, 4))

    return {matrix.name: matrix.input for matrix in LayerInputs.trace(readers, run_network).matrices}


def test_trace_flattened_view_is_the_same_input() -> None:
    assert trace_toy(lambda a, b, x: (a(x), b(x.view(-1, 4)))) == {"a": "a", "b": "a"}


def test_trace_equal_values_are_not_the_same_input() -> None:
    assert trace_toy(lambda a, b, x: (a(x), b(x.clone()))) == {"a": "a", "b": "b"}


def test_trace_input_changed_in_place_is_another_one() -> None:
    assert trace_toy(lambda a, b, x: (a(x), b(x.mul_(2.0)))) == {"a": "a", "b": "b"}


def test_trace_freed_memory_is_not_taken_for_the_same_input() -> None:
    assert trace_toy(lambda a, b, x: (a(x + 1.0), b(x + 2.0))) == {"a": "a", "b": "b"}


def test_trace_transposed_view_is_another_input() -> None:
    def forward(a: nn.Linear, b: nn.Linear, x: torch.Tensor) -> object:
        square = torch.zeros(2, 4, 4)
        return a(square), b(square.transpose(1, 2))

    assert trace_toy(forward) == {"a": "a", "b": "b"}


def test_trace_layer_called_twice_shares_only_with_the_same_calls() -> None:
    assert trace_toy(lambda a, b, x: (a(x), a(x[:1]), b(x))) == {"a": "a", "b": "b"}
    assert trace_toy(lambda a, b, x: (a(x), b(x), a(x[:1]), b(x[:1]))) == {"a": "a", "b": "a"}


def test_trace_modules_that_share_a_parameter_are_one_matrix() -> None:
    assert trace_toy(lambda a, b, x: (a(x), b(x)), shared=True) == {"a": "a"}


def test_trace_layer_that_does_not_run_is_refused() -> None:
    with pytest.raises(ModelError, match="b: found no call of its layer in a forward pass, expected"):
        trace_toy(lambda a, b, x: a(x))


def test_trace_input_of_unknown_shape_is_refused() -> None:
    with pytest.raises(ModelError, match=r"b: found an input of shape \(3, 2, 4\) .*, expected \(rows"):
        trace_toy(lambda a, b, x: (a(x), b(x.transpose(0, 1))))


def test_trace_hooks_are_gone_afterwards() -> None:
    run = network("mixtral")
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in run.model.modules())
    assert not any("forward" in module.__dict__ for module in run.model.modules())
    hidden, _ = run.run(padded_batch())
    assert hidden.isfinite().all()
