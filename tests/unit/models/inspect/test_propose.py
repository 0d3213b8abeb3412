"""Proposed specs compared with registered ones, and verification of specs that are wrong on purpose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedModel, T5Config

from das_ds.errors import ModelError
from das_ds.functional.units import UnitRule
from das_ds.models.architectures.registry import ARCHITECTURES, spec_for
from das_ds.models.architectures.spec import ArchitectureSpec, GateSite
from das_ds.models.inspect.describe import inspect_model
from das_ds.models.inspect.probe import probe_models, skeleton
from das_ds.models.inspect.propose import propose_table
from das_ds.models.inspect.structure import guess_objective
from das_ds.models.inspect.verify import verify_table
from helpers.tiny_models import SIZES, tiny_model

# Left out: experts are not linear layers, and a norm over the queries of all heads mixes the heads.
PROPOSED = sorted(set(ARCHITECTURES) - {"mixtral", "qwen3_moe", "olmo2"})
# Maps that serve words and relative positions at once are not discovered.
VARIANTS: dict[str, dict[str, Any]] = {"deberta-v2": {"share_att_key": False}}
OTHERS: dict[str, dict[str, Any]] = {
    "stablelm": {"num_attention_heads": 6, "num_key_value_heads": 2, "use_qkv_bias": True},
    "gptj": {"rotary_dim": 4},
    "starcoder2": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "falcon": {"ffn_hidden_size": 40},
    "bloom": {},
}


def other_config(model_type: str) -> Any:
    return AutoConfig.for_model(model_type, **{**SIZES, **OTHERS[model_type]})


def owners(spec: ArchitectureSpec, model: PreTrainedModel) -> dict[tuple[Any, ...], list[set[int]]]:
    """(parameter, layer, axis, group, reader) -> the units that own each entry."""
    return {
        (item.parameter, item.layer, item.axis, item.group, item.consumer): [
            set(row) - {-1} for row in item.units.tolist()
        ]
        for item in spec.layout(model).ownerships
    }


@pytest.mark.parametrize("model_type", PROPOSED)
def test_propose_table_equals_registered(model_type: str) -> None:
    model = tiny_model(model_type, **VARIANTS.get(model_type, {}))
    known = spec_for(model_type)
    proposal = propose_table(model.config, known.objective)
    assert not proposal.problems
    found = proposal.spec
    assert owners(found, model) == owners(known, model)
    assert found.layout(model).num_units == known.layout(model).num_units
    assert found.max_sequence_length(model) == known.max_sequence_length(model)
    assert found.logit_cap(model) == known.logit_cap(model)
    assert {(s.group, s.module, s.position) for s in found.sites} == {
        (s.group, s.module, s.position) for s in known.sites
    }
    embeddings, known_embeddings = (
        {name for name, depth in spec.depths(model).items() if depth == 0} for spec in (found, known)
    )
    # What is between an embedding table and the layers, in a module of its own, is added by hand.
    by_hand = ("embeddings_project", "project_in", "encoder.LayerNorm", "encoder.conv")
    assert embeddings == {name for name in known_embeddings if not any(part in name for part in by_hand)}


@pytest.mark.parametrize("model_type", sorted(OTHERS))
def test_propose_table_unregistered_is_complete(model_type: str) -> None:
    config = other_config(model_type)
    proposal = propose_table(config)
    assert not proposal.problems and not proposal.reasons
    layout = proposal.spec.layout(skeleton(config, "clm"))
    assert layout.num_units == {
        "head": config.num_attention_heads,
        "intermediate": 96 if model_type in ("gptj", "bloom") else 40,
        "output": 24,
    }


def test_propose_table_multi_query_attention() -> None:
    """Falcon's fused map: the queries of three heads, then one key and one value head that all of them use."""
    config = other_config("falcon")
    found = owners(propose_table(config).spec, skeleton(config, "clm"))
    rows = found["transformer.h.1.self_attention.query_key_value.weight", 1, 0, "head", False]
    assert rows == [{head} for head in range(3) for _ in range(8)] + [{0, 1, 2}] * 16


def test_propose_table_interleaved_qkv() -> None:
    config = other_config("bloom")
    found = owners(propose_table(config).spec, skeleton(config, "clm"))
    rows = found["transformer.h.0.self_attention.query_key_value.bias", 0, 0, "head", False]
    assert rows == [{head} for head in range(3) for _ in range(24)]


def test_propose_table_without_positions_has_no_limit() -> None:
    config = other_config("bloom")
    config.max_position_embeddings = None
    del config.max_position_embeddings
    assert propose_table(config).spec.max_sequence_length(skeleton(config, "clm")) > 10**6


def test_propose_table_grouped_query_attention() -> None:
    config = other_config("stablelm")
    found = owners(propose_table(config).spec, skeleton(config, "clm"))
    assert found["model.layers.0.self_attn.k_proj.bias", 0, 0, "head", False] == [{0, 1, 2}] * 4 + [{3, 4, 5}] * 4
    assert found["model.layers.0.self_attn.q_proj.bias", 0, 0, "head", False] == [{h} for h in range(6) for _ in "1234"]


def test_propose_table_leaves_out_experts_with_reason() -> None:
    proposal = propose_table(tiny_model("mixtral").config)
    assert not proposal.problems
    assert set(proposal.spec.units) == {"head"}
    assert proposal.reasons == {"MLP": "no linear layer is fed neuron by neuron"}
    assert "{base}.layers.{layer}.mlp.experts.down_proj" in proposal.spec.unmasked


def test_inspect_model_contradicted_proposal_raises_on_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ARCHITECTURES, "olmo2")
    table = inspect_model(AutoConfig.for_model("olmo2", **SIZES))
    assert "every feature of it reaches every unit" in table.reasons["self_attn.q_proj"]
    assert "NOT verified" in table.describe()
    with pytest.raises(ModelError, match="proposed table of olmo2 is not verified for head units"):
        table.check()


def test_inspect_model_large_model_needs_no_weights() -> None:
    config = AutoConfig.for_model("stablelm", hidden_size=8192, num_hidden_layers=80, num_attention_heads=64)
    table = inspect_model(config)
    table.check()
    assert "80 layers: proposed table" in table.describe()
    assert "8192x8192" in table.describe()


def test_propose_table_scaled_logits_raises() -> None:
    with pytest.raises(ModelError, match="the logits differ from those of lm_head behind the base model"):
        propose_table(AutoConfig.for_model("cohere", **SIZES, logit_scale=0.5))


def test_propose_table_unsupported_network_raises() -> None:
    with pytest.raises(ModelError, match="no masked and no causal language model of type 't5'"):
        propose_table(T5Config())
    with pytest.raises(ModelError, match="one list of 2 layers in albert, found none"):
        propose_table(AutoConfig.for_model("albert"))
    with pytest.raises(ModelError, match="no small network of type 'stablelm' can be tried; narrow: Unrecognized"):
        propose_table(other_config("stablelm"), "mlm")


def test_skeleton_bad_config_raises() -> None:
    config = AutoConfig.for_model("stablelm", hidden_size=30, num_attention_heads=4)
    with pytest.raises(ModelError, match="cannot build a model of type 'stablelm'"):
        skeleton(config, "clm")


def test_guess_objective_follows_architectures() -> None:
    assert guess_objective(AutoConfig.for_model("bert")) == "mlm"
    assert guess_objective(AutoConfig.for_model("bert", architectures=["BertLMHeadModel"])) == "clm"
    assert guess_objective(AutoConfig.for_model("gpt2")) == "clm"
    causal = AutoConfig.for_model("camembert", architectures=["CamembertForMaskedLM"], is_decoder=True)
    assert guess_objective(causal) == "clm"


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return next(iter(probe_models(tiny_model("llama").config, "clm")))


def changed_rule(part: str, **changes: Any) -> ArchitectureSpec:
    known = spec_for("llama")
    rules = tuple(replace(rule, **changes) if part in rule.parameter else rule for rule in known.rules)
    return replace(known, rules=rules)


def test_verify_table_right_spec_has_no_problems(llama: PreTrainedModel) -> None:
    assert verify_table(llama, spec_for("llama")) == {}


def test_verify_table_wrong_layout_is_reported() -> None:
    """Gate and up projection in one map, read as pairs of neighbors."""
    known = spec_for("phi3")
    rules = tuple(replace(rule, layout="contiguous") if rule.layout == "gate_up" else rule for rule in known.rules)
    probe = next(iter(probe_models(tiny_model("phi3").config, "clm")))
    problems = verify_table(probe, replace(known, rules=rules))
    assert set(problems) == {"intermediate"}
    assert "gate_up_proj.weight: axis 0 still has a gradient where intermediate 0 of" in problems["intermediate"][0]


def test_verify_table_wrong_group_is_reported(llama: PreTrainedModel) -> None:
    problems = verify_table(llama, changed_rule("self_attn.v_proj.weight", group="output", layout="contiguous", axis=1))
    assert any("v_proj.weight: axis 1 still has a gradient" in text for text in problems["output"])
    assert any("v_proj.weight: 8 entries of axis 0 lose their gradient" in text for text in problems["head"])


def test_verify_table_missing_consumer_is_reported(llama: PreTrainedModel) -> None:
    known = spec_for("llama")
    rules = tuple(rule for rule in known.rules if not (rule.consumer and rule.group == "intermediate"))
    problems = verify_table(llama, replace(known, rules=rules))
    assert "down_proj.weight: 1 entries of axis 1 lose their gradient" in problems["intermediate"][0]


def test_verify_table_wrong_site_is_reported(llama: PreTrainedModel) -> None:
    known = spec_for("llama")
    site = GateSite("head", "{base}.layers.{layer}.self_attn.o_proj", "output")
    problems = verify_table(llama, replace(known, sites=(site, *known.sites[1:])))
    assert "head" in problems


def test_verify_table_misfit_raises(llama: PreTrainedModel) -> None:
    extra = UnitRule("head", "{base}.layers.{layer}.router.weight", 0)
    with pytest.raises(ModelError, match=r"lacks: model.layers.0.router.weight"):
        verify_table(llama, replace(spec_for("llama"), rules=(*spec_for("llama").rules, extra)))


def test_inspect_model_other_objective_raises() -> None:
    with pytest.raises(ModelError, match="objective: found clm, but the registered table of roberta is for mlm"):
        inspect_model(tiny_model().config, "clm")
    table = inspect_model(tiny_model().config)
    assert "roberta, mlm, 2 layers: registered table" in table.describe() and not table.problems
    assert table.spec.position_offset == "pad_token_id"


@pytest.mark.parametrize(("model_type", "offset"), [("camembert", "pad_token_id"), ("bert", 0)])
def test_find_position_offset_after_padding_index(model_type: str, offset: int | str) -> None:
    table = inspect_model(AutoConfig.for_model(model_type, **SIZES, pad_token_id=3))
    assert table.spec.position_offset == offset
