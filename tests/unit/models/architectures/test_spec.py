"""Errors of architecture specs that do not fit; `test_tables.py` tests that the registered ones are right."""

from __future__ import annotations

from dataclasses import replace

import pytest

from das_ds.errors import ModelError
from das_ds.functional.units import HEAD, INTERMEDIATE, UnitRule
from das_ds.models.architectures.registry import spec_for
from das_ds.models.architectures.spec import ArchitectureSpec
from helpers.tiny_models import tiny_model


def test_spec_for_unknown_type_lists_known() -> None:
    with pytest.raises(ModelError, match="'t5'; known: bert, deberta-v2, distilbert"):
        spec_for("t5")


def changed(**changes: object) -> ArchitectureSpec:
    return replace(spec_for("roberta"), **changes)  # type: ignore[arg-type]


def test_layout_rule_without_parameter_raises() -> None:
    rules = (*spec_for("roberta").rules, UnitRule("head", "{base}.encoder.layer.{layer}.router.weight", 0))
    with pytest.raises(ModelError, match=r"lacks: roberta.encoder.layer.0.router.weight"):
        changed(rules=rules).layout(tiny_model())


def test_layout_parameter_without_rule_raises() -> None:
    with pytest.raises(ModelError, match=r"does not know \d parameters of this model: lm_head"):
        changed(unmasked=spec_for("roberta").unmasked[:-1]).layout(tiny_model())


def test_layout_indivisible_axis_raises() -> None:
    rules = tuple(
        replace(rule, axis=1) if rule.parameter.endswith("intermediate.dense.weight") else rule
        for rule in spec_for("roberta").rules
    )
    with pytest.raises(
        ModelError,
        match=r"axis 1 of intermediate units \(contiguous\) has 24 entries, which is no multiple of 40 units",
    ):
        changed(rules=rules).layout(tiny_model())


def test_layout_indivisible_axis_layout_raises() -> None:
    rules = (UnitRule(HEAD, "{base}.layers.{layer}.mlp.gate_proj.weight", axis=0, layout="kv"),)
    llama = replace(spec_for("llama"), rules=rules, key_value_heads="num_attention_heads")
    with pytest.raises(
        ModelError,
        match=r"axis 0 of head units \(kv\) has 40 entries, which is no multiple of 6 key/value heads",
    ):
        llama.layout(tiny_model("llama"))
    with pytest.raises(ModelError, match=r"\(kv\) has 6 entries, which is no multiple of 4 key/value heads"):
        replace(llama, key_value_heads="num_hidden_layers").layout(tiny_model("llama", num_hidden_layers=4))


def test_count_missing_attribute_raises() -> None:
    units = {**spec_for("gpt2").units, INTERMEDIATE: "n_inner|4*n_width"}
    spec = replace(spec_for("gpt2"), units=units)
    assert spec.layout(tiny_model("gpt2")).num_units[INTERMEDIATE] == 40
    with pytest.raises(
        ModelError, match=r"gpt2 architecture spec names an attribute .* not an integer: n_inner\|4\*n_width"
    ):
        spec.layout(tiny_model("gpt2", n_inner=None))


def test_compile_pattern_layer_matches_numbers_only() -> None:
    model = tiny_model("gpt2")
    model.transformer.h[0].ln_1.register_parameter("novel", model.transformer.h[0].ln_1.bias)
    spec = replace(
        spec_for("gpt2"), unmasked=tuple(p.replace("ln_1.*", "ln_1.weight") for p in spec_for("gpt2").unmasked)
    )
    with pytest.raises(ModelError, match=r"does not know 2 parameters of this model: transformer.h.0.ln_1.bias"):
        spec.layout(model)
