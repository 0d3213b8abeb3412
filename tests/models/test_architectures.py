"""Every architecture's table, proved on a tiny random network of the real class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from das_ds.errors import ModelError
from das_ds.functional.masks import MaskTable
from das_ds.functional.segments import SegmentTable, cover, importance_of
from das_ds.functional.units import GROUPS, HEAD, UnitLayout
from das_ds.models import language_model
from das_ds.models.dropout import has_dropout
from das_ds.models.gates import UnitGates
from das_ds.models.language_model import LanguageModel
from das_ds.models.registry import ADAPTERS, adapter_for
from helpers.matrix import record
from helpers.tiny_models import SIZES_OF, tiny_model, without_dropout

TYPES = sorted(ADAPTERS)
GROUPED = [model_type for model_type in TYPES if "num_key_value_heads" in SIZES_OF.get(model_type, {})]
LAYER, ROWS, LENGTH = 1, 3, 9
EPSILON = 1e-2
# A softmax ignores a constant added to all keys: the gradient of key biases is rounding alone, here and there just 0.
KEY_BIASES = (
    "key.bias",
    "k_proj.bias",
    "k_lin.bias",
    "key_proj.bias",
    "Wqkv.bias",
    "c_attn.bias",
    "query_key_value.bias",
)
# One norm over the queries (keys) of all heads: each row scales the others', and its gradient never vanishes.
COUPLED = {"olmo2": ("q_proj.weight", "k_proj.weight", "q_norm.weight", "k_norm.weight")}


def build(model_type: str) -> tuple[PreTrainedModel, LanguageModel, UnitLayout, UnitGates]:
    model = tiny_model(model_type, **without_dropout(model_type))
    adapter = adapter_for(model_type)
    return model, LanguageModel(model, adapter), adapter.layout(model), UnitGates(model, adapter)


def ids(rows: int = ROWS) -> torch.Tensor:
    return torch.randint(5, 100, (rows, LENGTH), generator=torch.Generator().manual_seed(0))


def loss(wrapped: LanguageModel, rows: int = ROWS) -> torch.Tensor:
    input_ids = ids(rows)
    hidden, losses = wrapped(input_ids, torch.arange(rows * LENGTH), input_ids.flatten().roll(-1))
    return losses.sum() + hidden.square().sum()


def ones(layout: UnitLayout) -> dict[str, torch.Tensor]:
    return {group: torch.ones(layout.num_layers, 1, units) for group, units in layout.num_units.items()}


def silent(model: nn.Module, layout: UnitLayout) -> dict[tuple[str, int], torch.Tensor]:
    """(parameter, axis) -> which of its rows (columns) have a gradient of exactly zero."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        blocks = gradient.reshape(layout.shapes[name])
        for axis in (0, 1):
            found[name, axis] = (blocks == 0).all(dim=2 - axis).flatten()
    return found


def silenced(model_type: str, closed: dict[str, list[int]]) -> Iterator[tuple[str, int, torch.Tensor, torch.Tensor]]:
    """(parameter, axis, entries that lost their gradient, entries that the table gives to the closed units alone)."""
    model, wrapped, layout, gates = build(model_type)
    loss(wrapped).backward()
    before = silent(model, layout)
    model.zero_grad(set_to_none=True)
    values = ones(layout)
    for group, units in closed.items():
        values[group][LAYER, :, units] = 0.0
    with gates.active(values, num_rows=ROWS):
        loss(wrapped).backward()
    after = silent(model, layout)
    for name, axis in before:
        meant = torch.zeros_like(before[name, axis])
        for item in layout.ownerships:
            if (item.parameter, item.axis, item.layer) == (name, axis, LAYER):
                is_closed = torch.zeros(layout.num_units[item.group] + 1, dtype=torch.bool)
                is_closed[closed.get(item.group, [])] = True
                nobody = item.units < 0
                meant |= (is_closed[item.units] | nobody).all(dim=1) & ~nobody.all(dim=1)
        yield name, axis, after[name, axis], meant
        lost = after[name, axis] & ~before[name, axis]
        if not name.endswith(KEY_BIASES):
            # A matrix that is silent as a whole is so along both axes; only its own axis says something.
            whole = bool(after[name, 1 - axis].all())
            assert whole or not (lost & ~meant).any(), f"{name} axis {axis}: more lost its gradient than the table says"


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("group", GROUPS)
def test_what_a_closed_unit_owns_or_is_read_by_gets_no_gradient_and_nothing_else(model_type: str, group: str) -> None:
    for name, axis, after, meant in silenced(model_type, {group: [2]}):
        if not name.endswith(COUPLED.get(model_type, ())):
            assert after[meant].all(), f"{name} axis {axis}: what the table gives to the unit still learns"
    record(model_type, "rules", "proved")


@pytest.mark.parametrize("model_type", GROUPED)
def test_a_key_value_head_is_silent_when_all_who_use_it_are(model_type: str) -> None:
    _, _, layout, _ = build(model_type)
    shared = [
        item for item in layout.ownerships if item.group == HEAD and item.layer == LAYER and item.units.shape[1] == 3
    ]
    assert shared
    checked = 0
    for name, axis, after, meant in silenced(model_type, {HEAD: [3, 4, 5]}):
        if name in {item.parameter for item in shared} and not name.endswith(COUPLED.get(model_type, ())):
            assert after[meant].all() and (axis == 1 or meant.any()), name
            checked += 1
    assert checked


@pytest.fixture(params=["at once", "in chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of five positions, or more than there are."""
    chunk = 5 if request.param == "in chunks" else 1000
    monkeypatch.setattr(language_model, "positions_per_chunk", lambda vocab_size, logits_mib: chunk)


@pytest.mark.usefixtures("chunks")
def test_the_newer_head_of_deberta_reads_the_embeddings() -> None:
    model = tiny_model("deberta-v2", legacy=False, **without_dropout("deberta-v2"))
    adapter, input_ids = adapter_for("deberta-v2"), ids()
    assert adapter.layout(model).num_units
    _, losses = LanguageModel(model, adapter)(input_ids, torch.arange(ROWS * LENGTH), input_ids.flatten())
    logits = model(input_ids=input_ids).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, input_ids.flatten(), reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("model_type", TYPES)
def test_the_head_gives_the_networks_own_losses(model_type: str) -> None:
    model, wrapped, layout, _ = build(model_type)
    input_ids = ids()
    with torch.no_grad():
        _, losses = wrapped(input_ids, torch.arange(ROWS * LENGTH), input_ids.flatten())
        logits = model(input_ids=input_ids).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits.double(), input_ids.flatten(), reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    record(model_type, "objective", adapter_for(model_type).objective.upper())
    counts = ", ".join(f"{units} {group}" for group, units in layout.num_units.items())
    record(model_type, "units", counts)


@pytest.mark.parametrize("model_type", TYPES)
def test_gates_of_one_change_nothing_and_those_of_later_rows_leave_the_first_alone(model_type: str) -> None:
    _, wrapped, layout, gates = build(model_type)
    nothing, input_ids = torch.zeros(0, dtype=torch.long), ids()
    with torch.no_grad():
        plain, _ = wrapped(input_ids, nothing, nothing)
        with gates.active(ones(layout), num_rows=ROWS):
            open_, _ = wrapped(input_ids, nothing, nothing)
        # Not all alike: a norm behind the units would undo a common factor.
        values = {group: torch.rand(value.shape) for group, value in ones(layout).items()}
        with gates.active(values, num_rows=ROWS, first_row=1):
            partly, _ = wrapped(input_ids, nothing, nothing)
        again, _ = wrapped(input_ids, nothing, nothing)
    torch.testing.assert_close(open_, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(partly[:1], plain[:1], rtol=1e-5, atol=1e-5)
    assert (partly[1:] - plain[1:]).abs().max() > 1e-3
    assert torch.equal(again, plain)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("group", GROUPS)
def test_measured_gate_gradients_equal_differences(model_type: str, group: str) -> None:
    _, wrapped, layout, gates = build(model_type)
    sums = {g: torch.zeros(layout.num_layers, ROWS, units) for g, units in layout.num_units.items()}
    with gates.measuring(sums, torch.ones(ROWS)) as anchor:
        torch.autograd.grad(loss(wrapped), anchor)
    unit = int(sums[group][LAYER].sum(dim=0).argmax())
    ends = []
    for sign in (1, -1):
        # Each row has a gate of its own, so that one pass moves one sequence and no other.
        row = []
        for number in range(ROWS):
            values = {g: v.repeat(1, ROWS, 1) for g, v in ones(layout).items()}
            values[group][LAYER, number, unit] += sign * EPSILON
            with torch.no_grad(), gates.active(values, num_rows=ROWS):
                row.append(loss(wrapped))
        ends.append(torch.stack(row))
    expected = (ends[0] - ends[1]).abs() / (2 * EPSILON)
    torch.testing.assert_close(sums[group][LAYER, :, unit], expected, rtol=2e-2, atol=2e-2 * expected.max().item())


@pytest.mark.parametrize("model_type", TYPES)
def test_noise_makes_views_differ_and_leaves_the_first_rows_alone(model_type: str) -> None:
    model, wrapped, _, gates = build(model_type)
    assert not has_dropout(model.config, adapter_for(model_type).dropouts)
    nothing, input_ids = torch.zeros(0, dtype=torch.long), ids(1).repeat(3, 1)
    with torch.no_grad():
        plain, _ = wrapped(input_ids, nothing, nothing)
        with gates.noise(0.2, num_rows=3, first_row=1):
            noisy, _ = wrapped(input_ids, nothing, nothing)
    torch.testing.assert_close(noisy[:1], plain[:1], rtol=1e-5, atol=1e-5)
    assert min((noisy[1] - noisy[2]).abs().max(), (noisy[1] - noisy[0]).abs().max()) > 1e-3


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "modernbert", "mixtral"])
@pytest.mark.parametrize("readers", [False, True])
def test_masks_equal_loops_over_every_weight_also_in_shards(model_type: str, readers: bool) -> None:
    _, _, layout, _ = build(model_type)
    generator = torch.Generator().manual_seed(1)
    importance = {g: torch.rand(layout.num_layers, u, generator=generator) for g, u in layout.num_units.items()}
    table = MaskTable(layout, readers=readers, shared_scale=0.75)
    table.load(importance)
    for name, (blocks, rows, columns) in layout.shapes.items():
        items = [item for item in layout.ownerships if item.parameter == name and (readers or not item.reader)]
        whole = torch.full((blocks, rows, columns), 0.0 if items else 0.25)
        for item in items:
            size = columns if item.axis else rows
            for entry, owners in enumerate(item.units.tolist()):
                share = max((importance[item.group][item.layer, u].item() for u in owners if u >= 0), default=0.0)
                block, place = divmod(entry, size)
                part = whole[block, :, place] if item.axis else whole[block, place]
                part.clamp_(min=share)
        flat, numel = whole.flatten(), blocks * rows * columns
        for first, stop in ((0, numel), (numel // 3, numel), (numel // 5 + 1, numel - numel // 7)):
            segments = cover(table.segments(name, start=0, offset=first, numel=stop - first), stop - first)
            found = importance_of(SegmentTable(stop - first, segments, table.values))
            torch.testing.assert_close(found, flat[first:stop], rtol=0, atol=1e-6, msg=f"{name} [{first}, {stop})")


@pytest.mark.parametrize("model_type", TYPES)
def test_a_parameter_that_no_rule_knows_is_refused(model_type: str) -> None:
    model = tiny_model(model_type)
    model.register_parameter("novelty", nn.Parameter(torch.zeros(3)))
    with pytest.raises(ModelError, match="does not know 1 parameters of this model: novelty"):
        adapter_for(model_type).layout(model)
    model = tiny_model(model_type)
    adapter_for(model_type).gate_modules(model).__next__()[2].register_parameter(
        "novelty", nn.Parameter(torch.zeros(3))
    )
    with pytest.raises(ModelError, match=r"does not know 1 parameters of this model: .*novelty"):
        adapter_for(model_type).layout(model)


def test_dense_layers_among_experts_and_other_heads_are_refused() -> None:
    with pytest.raises(ModelError, match=r"does not support models of which only some layers have experts: .*\[0\]"):
        adapter_for("qwen3_moe").layout(tiny_model("qwen3_moe", mlp_only_layers=[0]))
    with pytest.raises(ModelError, match=r"opt adapter does not support layerdrop: found 0\.1, allowed: 0"):
        adapter_for("opt").layout(tiny_model("opt", layerdrop=0.1))
    with pytest.raises(ModelError, match="bert adapter names a module that this model lacks: no_head"):
        LanguageModel(tiny_model("bert"), replace(adapter_for("bert"), lm_head=("no_head",)))
    with pytest.raises(ModelError, match="counts units by n_experts, but this model's config lacks"):
        replace(adapter_for("llama"), units={"head": "n_experts"}).layout(tiny_model("llama"))
