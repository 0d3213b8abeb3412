"""Architecture tables: complete, right by brute force, and clear when they do not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from das_ds.errors import ModelError
from das_ds.functional.units import UnitRule
from das_ds.models.adapter import ArchitectureAdapter
from das_ds.models.registry import adapter_for
from helpers.tiny_models import tiny_model

TYPES = ("bert", "roberta")


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


def test_unknown_model_type_lists_the_known() -> None:
    with pytest.raises(ModelError, match=r"'t5'; known: bert, deberta-v2, .*, xlm-roberta"):
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
