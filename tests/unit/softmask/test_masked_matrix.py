"""A change dW P of a masked matrix changes what its layer computes by dW P x, through the modules of real networks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from das_ds.config import LoraConfig
from das_ds.data.batch import Batch
from das_ds.softmask.masked_matrix import MaskedMatrix
from helpers.traced_inputs import NETWORKS, Traced, padded_batch, traced


def changes(run: Traced) -> Iterator[tuple[MaskedMatrix, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(matrix, its values (o, d), a random change dW P (o, d), the complete parameter as dW P changes it)."""
    generator = torch.Generator().manual_seed(0)
    for matrix in run.layers.matrices:
        root = torch.randn(matrix.width, matrix.width, generator=generator, dtype=torch.float64)
        projector = torch.linalg.inv(torch.eye(matrix.width, dtype=torch.float64) + root @ root.T / matrix.width)
        step = torch.randn(matrix.num_outputs, matrix.width, generator=generator, dtype=torch.float64) @ projector
        parameter = run.parameters[matrix.parameter].detach()
        own = slice(matrix.start, matrix.start + matrix.numel)
        values = parameter.flatten()[own]
        values = values.view(matrix.width, -1).T if matrix.transposed else values.view(-1, matrix.width)
        changed = parameter.clone().flatten()
        changed[own] += (step.T if matrix.transposed else step).flatten()
        yield matrix, values, step, changed.view_as(parameter)


def module_output(run: Traced, matrix: MaskedMatrix, x: torch.Tensor) -> torch.Tensor:
    """What the module with the parameter makes of vectors x (n, d); an expert of all of them, with weight 1."""
    parameter = run.parameters[matrix.parameter]
    owners: list[Any] = [
        m
        for m in run.model.modules()
        if any(p is parameter for p in m._parameters.values()) and not isinstance(m, nn.Embedding)
    ]
    with torch.no_grad():
        if not owners:
            # DeBERTa's newer head multiplies by the embeddings itself.
            return x @ parameter.T
        if matrix.parameter.endswith("gate_up_proj") and isinstance(parameter, nn.Parameter) and parameter.dim() == 3:
            expert = torch.full((len(x), 1), int(matrix.name.rpartition("[")[2][:-1]))
            output: torch.Tensor = owners[0](x, expert, torch.ones(len(x), 1, dtype=x.dtype))
            return output
        output = owners[0](x)
        # A router returns its logits first.
        return output[0] if isinstance(output, tuple) else output


def inner_of_expert(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ weight.T).chunk(2, dim=1)
    return functional.silu(gate) * up


def check_changes(run: Traced) -> int:
    """Number of matrices whose module was compared with the formula."""
    vectors: dict[str, torch.Tensor] = {}

    def keep_first(name: str, x: torch.Tensor, *_: object) -> None:
        vectors.setdefault(name, x)

    run.record(padded_batch(), keep_first)
    num_compared = 0
    for matrix, values, step, changed in changes(run):
        x = vectors[matrix.input]
        parameter = run.parameters[matrix.parameter]
        # These are compared below, by what their layer makes of a batch.
        if ".conv." in matrix.name or (matrix.parameter.endswith("down_proj") and parameter.dim() == 3):
            continue
        before = module_output(run, matrix, x)
        kept = parameter.data
        parameter.data = changed
        found = module_output(run, matrix, x) - before
        parameter.data = kept
        expected = x @ step.T
        if parameter.dim() == 3:
            expert = int(matrix.name.rpartition("[")[2][:-1])
            down = run.parameters[matrix.parameter.replace("gate_up", "down")].detach()[expert]
            expected = (inner_of_expert(values + step, x) - inner_of_expert(values, x)) @ down.T
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        num_compared += 1
    return num_compared


@pytest.mark.parametrize("name", NETWORKS)
def test_change_of_a_matrix_changes_its_module_by_the_formula(name: str) -> None:
    """W -> W + dW P adds dW P x: width, orientation and offset of every matrix are right."""
    model_type, config = NETWORKS[name]
    assert check_changes(traced(model_type, **config)) >= 9


def test_change_of_lora_changes_its_module_by_the_formula(tmp_path: Path) -> None:
    targets = ["c_attn", "c_fc", "mlp.c_proj"]
    assert check_changes(traced("gpt2", LoraConfig(rank=2, target_modules=targets), tmp_path)) == 12


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_change_of_a_down_projection_changes_the_layer_by_the_weighted_formula(name: str) -> None:
    """The experts' output changes by w dW P a for the tokens of the expert, and by nothing for others."""
    run = traced(NETWORKS[name][0])
    layer = "model.layers.1.mlp.experts"
    outputs: list[torch.Tensor] = []
    handle = run.model.get_submodule(layer).register_forward_hook(lambda _, __, output: outputs.append(output))
    inner: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor | None] = {}

    def receive(name: str, x: torch.Tensor, w: torch.Tensor | None, _: bool) -> None:
        inner[name] = x
        weights[name] = w

    batch = padded_batch()
    batch = Batch(batch.input_ids, batch.corrupted_ids, batch.predicted, batch.targets, torch.ones(4))
    run.record(batch, receive)
    for matrix, _, step, changed in changes(run):
        if matrix.parameter != f"{layer}.down_proj":
            continue
        parameter = run.parameters[matrix.parameter]
        kept = parameter.data
        parameter.data = changed
        run.run(batch)
        parameter.data = kept
        squared = weights[matrix.name]
        assert squared is not None
        change = outputs[-1] - outputs[0]
        # Summed over tokens, since the recorded vectors do not say which token they belong to.
        found = change.square().sum(dim=1)
        expected = squared.double() * (inner[matrix.name] @ step.T).square().sum(dim=1)
        assert int((found > 1e-18).sum()) == len(expected)
        torch.testing.assert_close(found.sum(), expected.sum(), rtol=1e-6, atol=0.0)
    handle.remove()


def test_change_of_a_convolution_changes_it_by_the_formula() -> None:
    run = traced("deberta-v2", **NETWORKS["deberta-v2, convolution and newer head"][1])
    module: Any = run.model.get_submodule("deberta.encoder.conv.conv")
    outputs: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _, __, output: outputs.append(output.transpose(1, 2).flatten(0, 1)))
    windows: dict[str, torch.Tensor] = {}
    run.record(padded_batch(), lambda name, x, *_: windows.update({name: x}))
    for matrix, _, step, changed in changes(run):
        if ".conv.conv." not in matrix.name:
            continue
        kept = module.weight.data
        module.weight.data = changed
        run.run(padded_batch())
        module.weight.data = kept
        expected = torch.zeros_like(outputs[0])
        first = matrix.start // matrix.width
        expected[:, first : first + matrix.num_outputs] = windows[matrix.input] @ step.T
        torch.testing.assert_close(outputs[-1] - outputs[0], expected)
    handle.remove()
