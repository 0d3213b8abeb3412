"""Recorded inputs against hooks and formulas written out in the test, in float64."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from das_ds.config import LoraConfig
from das_ds.data.batch import Batch
from das_ds.errors import ModelError
from das_ds.softmask.linear_inputs import find_masked_matrices, record_layer_inputs, weigh_by_row
from helpers.tiny_models import tiny_model
from helpers.traced_inputs import NETWORKS, Traced, padded_batch, traced

Moments = dict[str, tuple[torch.Tensor, float]]
"""Input -> (sum of w x x^T (d, d), sum of w)."""


@cache
def network(name: str) -> Traced:
    model_type, changes = NETWORKS[name]
    return traced(model_type, **changes)


def add(sums: Moments, name: str, x: torch.Tensor, weights: torch.Tensor) -> None:
    total = torch.einsum("n,ni,nj->ij", weights.double(), x, x)
    before, count = sums.get(name, (torch.zeros_like(total), 0.0))
    sums[name] = (before + total, count + float(weights.sum()))


def recorded(run: Traced, batch: Batch) -> Moments:
    """Tables have the inputs' names with a star."""
    sums: Moments = {}

    def receive(name: str, x: torch.Tensor, weights: torch.Tensor | None, is_table: bool) -> None:
        assert x.dim() == 2 and (weights is None or weights.shape == x.shape[:1])
        add(sums, f"{name}*" if is_table else name, x, torch.ones(len(x)) if weights is None else weights)

    run.record(batch, receive)
    return sums


def plainly(run: Traced, batch: Batch) -> Moments:
    """The same of linear layers, by hooks that know the shapes of this batch."""
    names = {id(p): name for name, p in run.model.named_parameters() if p.requires_grad}
    sums: Moments = {}
    removes = []
    token_weights = batch.row_weights.repeat_interleave(batch.input_ids.shape[1])

    def hook(name: str, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2)
        if len(x) == len(token_weights):
            add(sums, name, x, token_weights)
        elif len(x) == len(batch.predicted):
            add(sums, name, x, torch.ones(len(x)))
        else:
            add(sums, f"{name}*", x, torch.ones(len(x)))

    for module in run.model.modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) in names:
            name = names[id(module.weight)]
            removes.append(module.register_forward_pre_hook(lambda _, inputs, name=name: hook(name, inputs)))
    run.run(batch)
    for handle in removes:
        handle.remove()
    return sums


@pytest.mark.parametrize("name", NETWORKS)
def test_record_moments_of_linear_layers_equal_those_of_plain_hooks(name: str) -> None:
    run = network(name)
    found = recorded(run, padded_batch())
    expected = plainly(run, padded_batch())
    assert len(expected) >= 5
    compared = 0
    for matrix in run.layers.matrices:
        for table in ("", "*"):
            if matrix.name + table in expected:
                moment, count = expected[matrix.name + table]
                # Also those that read the input of another matrix.
                torch.testing.assert_close(found[matrix.input + table][0], moment)
                assert found[matrix.input + table][1] == count
                compared += 1
    assert compared == len(expected)


def test_record_lora_reads_what_the_adapted_layer_reads(tmp_path: Path) -> None:
    run = traced("llama", LoraConfig(rank=2, target_modules=["q_proj", "k_proj", "down_proj"]), tmp_path)
    found = recorded(run, padded_batch())
    for name, (moment, _) in plainly(run, padded_batch()).items():
        torch.testing.assert_close(found[run.matrices[name].input][0], moment)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_record_moments_of_experts_are_weighted_by_squared_routing_weights(name: str) -> None:
    """Token by token: w^2 x x^T of gate and up, w^2 a a^T of down with a = act(gate x) * up x."""
    run = network(name)
    batch = padded_batch()
    found = recorded(run, batch)
    layer = "model.layers.1.mlp.experts"
    experts: Any = run.model.get_submodule(layer)
    calls: list[tuple[torch.Tensor, ...]] = []
    handle = experts.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    run.run(batch)
    handle.remove()
    ((hidden, index, weights),) = calls
    expected: Moments = {}
    length = batch.input_ids.shape[1]
    for token, (chosen, shares) in enumerate(zip(index.tolist(), weights.tolist(), strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            x = hidden[token]
            gate, up = (experts.gate_up_proj[expert].detach() @ x).chunk(2)
            inner = functional.silu(gate) * up
            weight = torch.tensor([share**2 * float(batch.row_weights[token // length])])
            add(expected, f"{layer}.gate_up_proj[{expert}]", x[None], weight)
            add(expected, f"{layer}.down_proj[{expert}]", inner[None], weight)
    assert len(expected) == 8
    for matrix, (moment, count) in expected.items():
        # Weights are float32.
        torch.testing.assert_close(found[matrix][0], moment, rtol=1e-6, atol=1e-6)
        assert found[matrix][1] == pytest.approx(count, rel=1e-6)


def test_record_experts_leave_the_output_as_it_is() -> None:
    run = network("mixtral")
    with_hooks = run.record(padded_batch(), lambda *_: None)
    torch.testing.assert_close(with_hooks, run.run(padded_batch())[0])


def test_record_expert_without_tokens_gives_no_vectors() -> None:
    run = traced("mixtral")
    experts: Any = run.model.get_submodule("model.layers.0.mlp.experts")
    # All tokens go to the first expert, twice.
    experts.register_forward_pre_hook(lambda _, inputs: (inputs[0], torch.zeros_like(inputs[1]), inputs[2]))
    counts: dict[str, int] = {}
    run.record(padded_batch(), lambda name, x, *_: counts.update({name: len(x)}))
    for matrix in ("gate_up_proj", "down_proj"):
        assert [counts[f"model.layers.0.mlp.experts.{matrix}[{e}]"] for e in range(4)] == [2 * 48, 0, 0, 0]


def test_record_convolution_windows_give_its_output() -> None:
    """Windows times the flattened weight, group by group; rows that fill the batch do not count."""
    run = network("deberta-v2, convolution and newer head")
    name = "deberta.encoder.conv.conv"
    module: Any = run.model.get_submodule(name)
    outputs: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _, __, output: outputs.append(output))
    windows: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor | None] = {}

    def receive(name: str, x: torch.Tensor, w: torch.Tensor | None, _: bool) -> None:
        windows[name] = x
        weights[name] = w

    run.record(padded_batch(), receive)
    handle.remove()
    groups = [
        windows[f"{name}.weight[{group}]"] @ module.weight.detach().flatten(1)[12 * group : 12 * (group + 1)].T
        for group in range(2)
    ]
    expected = torch.cat(groups, dim=1) + module.bias.detach()
    torch.testing.assert_close(outputs[0].transpose(1, 2).flatten(0, 1), expected)
    for group in range(2):
        found = weights[f"{name}.weight[{group}]"]
        assert found is not None and torch.equal(found, padded_batch().row_weights.repeat_interleave(12))


def test_record_newer_deberta_head_reads_what_the_embeddings_multiply() -> None:
    run = network("deberta-v2, convolution and newer head")
    head: Any = run.model.get_submodule("lm_predictions.lm_head")
    logits: list[torch.Tensor] = []
    handle = head.register_forward_hook(lambda _, __, output: logits.append(output))
    vectors: dict[str, torch.Tensor] = {}
    run.record(padded_batch(), lambda name, x, *_: vectors.update({name: x}))
    handle.remove()
    embeddings = "deberta.embeddings.word_embeddings.weight"
    expected = vectors[embeddings] @ run.parameters[embeddings].detach().T + head.bias.detach()
    torch.testing.assert_close(logits[0], expected)


def test_record_table_is_one_even_if_the_batch_has_its_shape() -> None:
    """One row of as many positions as the table of relative positions has rows."""
    run = network("deberta-v2, convolution and newer head")
    ids = torch.arange(5, 21)[None]
    batch = Batch(ids, ids, torch.tensor([3]), torch.tensor([7]), torch.zeros(1))
    tables: dict[str, tuple[int, bool, bool]] = {}

    def receive(name: str, x: torch.Tensor, weights: torch.Tensor | None, is_table: bool) -> None:
        tables[name] = (len(x), weights is None, is_table)

    run.record(batch, receive)
    table = run.matrices["deberta.encoder.layer.1.attention.self.pos_query_proj.weight"].input
    assert tables[table] == (16, True, True)
    assert tables["deberta.encoder.layer.1.attention.self.query_proj.weight"] == (16, False, False)


def test_record_head_in_chunks_gives_the_same_moments() -> None:
    run = traced("deberta-v2", legacy=False)
    expected = recorded(run, padded_batch())
    run.network._losses._chunk = 3
    calls: list[int] = []
    run.record(padded_batch(), lambda _, x, *__: calls.append(len(x)), {"lm_predictions.lm_head.dense.weight"})
    assert calls[:4] == [3, 3, 3, 1] and sum(calls) == 10
    for name, (moment, count) in recorded(run, padded_batch()).items():
        torch.testing.assert_close(moment, expected[name][0])
        assert count == expected[name][1]


def test_record_gives_only_what_is_wanted_and_removes_its_hooks() -> None:
    run = network("mixtral")
    wanted = {"model.layers.1.mlp.experts.down_proj[2]", "lm_head.weight"}
    names: list[str] = []
    run.record(padded_batch(), lambda name, *_: names.append(name), wanted)
    assert sorted(names) == sorted(wanted)
    run.run(padded_batch())
    assert len(names) == 2
    assert not any("forward" in module.__dict__ for module in run.model.modules())


def test_record_rejects_unknown_input_missing_batch_and_gradients() -> None:
    run = network("roberta")
    with pytest.raises(AssertionError, match="expected names of inputs"):
        run.record(padded_batch(), lambda *_: None, {"roberta.encoder.layer.0.attention.self.key.weight"})
    batch = padded_batch()
    with (
        record_layer_inputs(run.layers, set(run.layers.sites), lambda *_: None, weigh_by_row),
        pytest.raises(AssertionError, match="start"),
    ):
        run.run(batch)
    with record_layer_inputs(run.layers, set(run.layers.sites), lambda *_: None, weigh_by_row) as recorder:
        recorder.start(batch)
        with pytest.raises(AssertionError, match="activation checkpointing"):
            run.network(batch.corrupted_ids, batch.predicted, batch.targets)


def test_find_matrix_of_unknown_layer_is_refused() -> None:
    model = tiny_model("roberta")
    model.lm_head.mixer = nn.Bilinear(3, 4, 5)
    run: Any = SimpleNamespace(
        network=SimpleNamespace(model=model),
        engine=SimpleNamespace(parameters=dict(model.named_parameters())),
        config=SimpleNamespace(method=SimpleNamespace(name="some")),
        lora=None,
    )
    run.network = nn.Module()
    run.network.model = model
    with pytest.raises(ModelError, match=r"found some, but lm_head.mixer.weight \(5, 3, 4\) .*; allowed are linear"):
        find_masked_matrices(run)
