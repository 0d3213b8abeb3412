"""LoRA: owners by brute force, merging and files compared with peft, error messages."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from das_ds.config import LoraConfig
from das_ds.errors import ConfigError, ModelError
from das_ds.functional.units import GROUPS, HEAD, INTERMEDIATE, OUTPUT, Ownership, UnitLayout, UnitRule
from das_ds.models.architectures.registry import spec_for
from das_ds.models.architectures.spec import ArchitectureSpec, GateSite
from das_ds.models.gates import UnitGates
from das_ds.models.language_model import LanguageModel
from das_ds.models.lora import AdaptedLinear, Lora, adapt_layout
from helpers.lora import adapted
from helpers.tiny_models import NO_DROPOUT, tiny_model

RANK = 4
BLOCK = "{base}.h.{layer}"
TRANSPOSED = ArchitectureSpec(
    model_type="gpt2",
    objective="clm",
    units={HEAD: "n_head", INTERMEDIATE: "n_inner", OUTPUT: "n_embd"},
    rules=(
        UnitRule(HEAD, f"{BLOCK}.attn.c_attn.weight", axis=1, layout="qkv"),
        UnitRule(HEAD, f"{BLOCK}.attn.c_attn.bias", axis=0, layout="qkv"),
        UnitRule(HEAD, f"{BLOCK}.attn.c_proj.weight", axis=0),
        UnitRule(INTERMEDIATE, f"{BLOCK}.mlp.c_fc.weight", axis=1),
        UnitRule(INTERMEDIATE, f"{BLOCK}.mlp.c_fc.bias", axis=0),
        UnitRule(INTERMEDIATE, f"{BLOCK}.mlp.c_proj.weight", axis=0, consumer=True),
        UnitRule(OUTPUT, f"{BLOCK}.mlp.c_proj.weight", axis=1),
        UnitRule(OUTPUT, f"{BLOCK}.mlp.c_proj.bias", axis=0),
    ),
    sites=(
        GateSite(HEAD, f"{BLOCK}.attn.c_proj", "input"),
        GateSite(INTERMEDIATE, f"{BLOCK}.mlp.c_fc", "output"),
        GateSite(OUTPUT, f"{BLOCK}.mlp.c_proj", "output"),
    ),
    unmasked=("*.wte.weight", "*.wpe.weight", "*.ln_*", "*.attn.c_proj.bias"),
    lm_head=("lm_head",),
)
"""GPT-2's layers: weights stored (inputs, outputs), query, key and value in one."""


def network(model_type: str) -> tuple[PreTrainedModel, ArchitectureSpec]:
    if model_type != "gpt2":
        return tiny_model(model_type, **NO_DROPOUT), spec_for(model_type)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": 100, "n_positions": 40, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 40}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(GPT2Config(**sizes, **dropout, initializer_range=0.2))
    return model, TRANSPOSED


def tokens() -> torch.Tensor:
    return torch.randint(5, 100, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2"])
def test_adapt_layout_closed_unit_has_no_gradient(model_type: str, group: str, tmp_path: Path) -> None:
    """With the gate of a unit at zero, exactly the entries that it owns or that read it have no gradient."""
    model, spec = network(model_type)
    full = spec.layout(model)
    lora, _ = adapted(model, spec, LoraConfig(rank=RANK), tmp_path)
    layout = lora.layout(full)
    gates = UnitGates(model, spec)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert layout.sizes == {name: p.numel() for name, p in parameters.items()}
    assert len(layout.ownerships) == sum(item.parameter.endswith("weight") for item in full.ownerships)
    layer = 1
    unit = 2
    ids = tokens()
    values = {name: torch.ones(layout.num_layers, 1, units) for name, units in layout.num_units.items()}
    values[group][layer, :, unit] = 0.0
    with gates.active(values, num_rows=3):
        hidden, losses = LanguageModel(model, spec)(ids, torch.arange(27), ids.flatten())
    (losses.sum() + hidden.square().sum()).backward()
    for item in layout.ownerships:
        gradient = parameters[item.parameter].grad
        assert gradient is not None and gradient.shape == layout.shapes[item.parameter][1:]
        per_entry = gradient.abs().amax(dim=1 - item.axis)
        zero = {int(u) for u, value in zip(item.units[:, 0], per_entry, strict=True) if value < 1e-8}
        alive = {int(u) for u, value in zip(item.units[:, 0], per_entry, strict=True) if value >= 1e-8}
        # gelu(0) = 0, so the column of A that reads a closed intermediate unit gets no gradient either.
        expected = {unit} if (item.group, item.layer) == (group, layer) else set()
        assert zero == expected and alive == set(range(layout.num_units[item.group])) - expected, item


def test_adapt_layout_shared_factor_has_no_owner() -> None:
    model, spec = network("roberta")
    layout = spec.layout(model)
    layout = Lora.plan(model, layout, LoraConfig(rank=RANK)).layout(layout)
    owned = {item.parameter for item in layout.ownerships if not item.consumer}
    free = {name.split(".layer.0.")[1] for name in set(layout.shapes) - owned if ".layer.0." in name}
    inputs = [*(f"attention.self.{kind}" for kind in ("query", "key", "value")), "intermediate.dense", "output.dense"]
    assert free == {
        *(f"{name}.lora_A.default.weight" for name in inputs),
        "attention.output.dense.lora_B.default.weight",
    }


def test_adapt_layout_keeps_shared_owners() -> None:
    sharers = torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3]])
    owned = Ownership("k.weight", HEAD, 0, 0, sharers, False)
    layout = UnitLayout("any", 1, {HEAD: 4}, (owned, Ownership("k.bias", HEAD, 0, 0, sharers, False)), {})
    k = AdaptedLinear("k.weight", "k.a", "k.b", rank=2, num_inputs=8, num_outputs=4, transposed=False)
    (found,) = adapt_layout(layout, [k]).ownerships
    assert found.parameter == "k.b" and found.axis == 0 and found.units is sharers


@pytest.mark.parametrize("model_type", ["roberta", "gpt2"])
def test_merge_equals_adapted_network_and_peft(model_type: str, tmp_path: Path) -> None:
    model, spec = network(model_type)
    lora, _ = adapted(model, spec, LoraConfig(rank=RANK, alpha=6.0), tmp_path / "adapter")
    expected = model(tokens()).logits
    assert not torch.allclose(expected, network(model_type)[0](tokens()).logits, atol=0.01)
    base, _ = network(model_type)
    adapted_weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    weights = {base: adapted_weights[name] for name, base in lora.base_names(model).items()}
    for linear in lora.linears:
        assert lora.adapted(linear.weight) is linear
        a, b = adapted_weights[linear.a], adapted_weights[linear.b]
        weights[linear.weight] = lora.merge(linear, weights[linear.weight], a, b)
    assert set(weights) == dict(base.named_parameters()).keys()
    base.load_state_dict(weights, strict=False)
    torch.testing.assert_close(base(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    loaded = PeftModel.from_pretrained(network(model_type)[0], str(tmp_path / "adapter"))
    assert torch.equal(loaded(tokens()).logits, expected)


def test_attach_new_adapters_are_identity_by_seed() -> None:
    found = []
    for seed in (1, 1, 2):
        model, spec = network("roberta")
        expected = model(tokens()).logits
        torch.rand(3)
        Lora.plan(model, spec.layout(model), LoraConfig()).attach(model, seed=seed)
        assert torch.equal(model(tokens()).logits, expected)
        found.append([p for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not torch.equal(found[0][0], found[2][0])


def test_adapters_with_activation_checkpointing_same_gradients(tmp_path: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, spec = network("roberta")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        adapted(model.train(), spec, LoraConfig(rank=RANK), tmp_path)
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]) and gradient.abs().max() > 0  # type: ignore[union-attr, arg-type]


def planned(**config: object) -> Lora:
    model, spec = network("roberta")
    return Lora.plan(model, spec.layout(model), LoraConfig(**config))


def test_plan_targets_match_name_ends() -> None:
    assert [item.weight for item in planned(target_modules=["query", "0.output.dense"]).linears] == [
        "roberta.encoder.layer.0.attention.self.query.weight",
        "roberta.encoder.layer.1.attention.self.query.weight",
        "roberta.encoder.layer.0.output.dense.weight",
    ]


def test_plan_unknown_target_raises() -> None:
    allowed = "attention.self.query, attention.self.key, attention.self.value, attention.output.dense, "
    with pytest.raises(ConfigError, match=rf"target_modules: found q_proj, allowed: {allowed}intermediate.dense"):
        planned(target_modules=["query", "q_proj"])
    with pytest.raises(ConfigError, match=r"found lm_head.dense, allowed: attention"):
        planned(target_modules=["lm_head.dense"])


def test_plan_rank_too_large_raises() -> None:
    planned(rank=24)
    with pytest.raises(ConfigError, match=r"model.lora.rank: found 25, allowed: 1 to 24, the smaller side of roberta"):
        planned(rank=25)


def test_attach_without_peft_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"model.lora: needs the package peft.*das_ds\[lora\]"):
        planned().attach(tiny_model(), seed=0)


def test_attach_other_config_raises(tmp_path: Path) -> None:
    model, spec = network("roberta")
    adapted(model, spec, LoraConfig(rank=RANK), tmp_path)
    with pytest.raises(ModelError, match=r"adapters of another network or config: alpha 16.0, expected 16.0.*lora_A"):
        planned(rank=5).attach(tiny_model(), seed=0, weights=tmp_path)
    with pytest.raises(ModelError, match=r"alpha 16.0, expected 1.0; tensors that differ: none"):
        planned(rank=RANK, alpha=1.0).attach(tiny_model(), seed=0, weights=tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    for change in ({"use_rslora": True}, {"alpha_pattern": {"query": 64}}, {"peft_type": "IA3"}, {"bias": "all"}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | change))
        with pytest.raises(ModelError, match=f"{next(iter(change))}: found .*as in adapters of das_ds"):
            planned(rank=RANK).attach(tiny_model(), seed=0, weights=tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="cannot read the adapters"):
        planned(rank=RANK).attach(tiny_model(), seed=0, weights=tmp_path)


def stacked(model: PreTrainedModel) -> UnitLayout:
    """A layout in which the intermediate maps are stacked by expert."""
    layout = spec_for("roberta").layout(model)
    name = "roberta.encoder.layer.0.intermediate.dense"
    model.get_submodule(name).weight = torch.nn.Parameter(torch.zeros(2, 20, 24))
    model.set_submodule(name, Stacked(model.get_submodule(name)))
    return UnitLayout("moe", 2, layout.num_units, layout.ownerships, {**layout.shapes, f"{name}.weight": (2, 20, 24)})


class Stacked(torch.nn.Module):
    def __init__(self, linear: torch.nn.Module) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias


def test_plan_stacked_experts_stay_frozen_with_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    layout = stacked(model)
    lora = Lora.plan(model, layout, LoraConfig())
    assert "experts take no adapters and stay frozen: intermediate.dense.weight" in caplog.text
    assert "roberta.encoder.layer.0.intermediate.dense.weight" not in {item.weight for item in lora.linears}
    with pytest.raises(ConfigError, match=r"found 0.intermediate.dense.*experts take no adapters: intermediate.dense"):
        Lora.plan(model, layout, LoraConfig(target_modules=["0.intermediate.dense"]))


def test_plan_without_linear_layers_raises() -> None:
    model, _ = network("roberta")
    layout = UnitLayout("other", 2, {HEAD: 3}, (), {})
    with pytest.raises(ModelError, match="units of other own no linear layer"):
        Lora.plan(model, layout, LoraConfig())
