"""Architecture tables: complete, right by brute force, and clear when they do not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from das_ds.errors import ModelError
from das_ds.functional.units import GROUPS, UnitRule
from das_ds.models.adapter import ArchitectureAdapter
from das_ds.models.gates import UnitGates
from das_ds.models.language_model import LanguageModel
from das_ds.models.registry import ADAPTERS, adapter_for
from helpers.tiny_models import NO_DROPOUT, tiny_model

TYPES = sorted(ADAPTERS)


@pytest.mark.parametrize("model_type", TYPES)
def test_every_parameter_is_owned_or_left_out_on_purpose(model_type: str) -> None:
    model = tiny_model(model_type)
    layout = adapter_for(model_type).layout(model)
    assert set(layout.shapes) == {name for name, _ in model.named_parameters()}
    owned = {item.parameter for item in layout.ownerships if not item.reader}
    for name in set(layout.shapes) - owned:
        assert any(
            part in name for part in ("embeddings", "LayerNorm", "attention.output.dense.bias", "lm_head", "cls")
        )
    assert layout.num_units == {"head": 3, "intermediate": 40, "output": 24}


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("group", GROUPS)
def test_parameters_of_a_closed_unit_get_no_gradient(model_type: str, group: str) -> None:
    """With one unit's gate at zero nothing that only makes or only reads this unit can matter."""
    model = tiny_model(model_type, **NO_DROPOUT)
    adapter = adapter_for(model_type)
    layout, gates = adapter.layout(model), UnitGates(model, adapter)
    layer, unit = 1, 2
    values = {name: torch.ones(layout.num_layers, 1, units) for name, units in layout.num_units.items()}
    values[group][layer, :, unit] = 0.0
    ids = torch.randint(5, 100, (3, 9), generator=torch.Generator().manual_seed(0))
    wrapped = LanguageModel(model, adapter)
    with gates.active(values, num_rows=3):
        hidden, losses = wrapped(ids, torch.arange(27), ids.flatten())
    (losses.sum() + hidden.square().sum()).backward()
    parameters = dict(model.named_parameters())
    for item in layout.ownerships:
        gradient = parameters[item.parameter].grad
        assert gradient is not None
        entries = gradient.reshape(layout.shapes[item.parameter]).movedim(1 + item.axis, 1).flatten(0, 1).flatten(1)
        units, per_entry = item.units[:, 0], entries.abs().amax(dim=1)
        per_unit = torch.zeros(layout.num_units[item.group]).index_reduce(0, units, per_entry, "amax")
        # gelu(0) = 0, so the column that reads a closed intermediate unit gets no gradient either.
        expected_zero = {unit} if item.group == group and item.layer == layer else set()
        # A softmax ignores a constant added to all keys, so key biases never have a gradient.
        if item.parameter.endswith("key.bias"):
            continue
        zero = {index for index, value in enumerate(per_unit.tolist()) if value < 1e-7}
        assert zero == expected_zero, item


def test_unknown_model_type_lists_the_known() -> None:
    with pytest.raises(ModelError, match="'t5'; known: bert, roberta"):
        adapter_for("t5")


def changed(**changes: object) -> ArchitectureAdapter:
    return replace(adapter_for("roberta"), **changes)  # type: ignore[arg-type]


def test_rule_without_parameter_is_named() -> None:
    rules = (*adapter_for("roberta").rules, UnitRule("head", "{base}.encoder.layer.{layer}.router.weight", 0))
    with pytest.raises(ModelError, match=r"lacks: roberta.encoder.layer.0.router.weight"):
        changed(rules=rules).layout(tiny_model())


def test_parameter_without_rule_is_named() -> None:
    with pytest.raises(ModelError, match=r"does not know \d parameters of this model: lm_head"):
        changed(unmasked=adapter_for("roberta").unmasked[:-1]).layout(tiny_model())


def test_axis_that_is_no_multiple_of_units_is_named() -> None:
    rules = tuple(
        replace(rule, axis=1) if rule.parameter.endswith("intermediate.dense.weight") else rule
        for rule in adapter_for("roberta").rules
    )
    with pytest.raises(
        ModelError, match=r"axis 1 of intermediate units \(evenly\) has 24 entries, which is no multiple of 40 units"
    ):
        changed(rules=rules).layout(tiny_model())
