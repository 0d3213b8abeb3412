"""Masks of a protector in plain torch, against formulas written out in float64 and against unmasked optimizers."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import Adafactor, AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from das_ds.errors import ConfigError, DasError, DataError, ImportanceError, ModelError, RunFolderError, TrainingError
from das_ds.integrations import Protector
from das_ds.integrations.protector import unwrap_model
from das_ds.integrations.settings import METHODS
from das_ds.models.architectures.registry import spec_for
from das_ds.softmask.directions_file import load_directions
from das_ds.softmask.importance_file import load_parameter_importance, load_unit_importance, save_unit_importance
from helpers.tiny_models import CONFIGS, NO_DROPOUT, tiny_model
from helpers.tiny_tokenizer import tiny_tokenizer

RATE = 0.1
Inputs = dict[str, torch.Tensor]


def small_network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def vectors(seed: int, num_rows: int = 6) -> torch.Tensor:
    return torch.randn(num_rows, 5, generator=torch.Generator().manual_seed(seed))


def text(seed: int, *, num_rows: int = 4, causal: bool = True) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 100, (num_rows, 9), generator=generator)
    labels = ids if causal else ids.masked_fill(torch.rand(ids.shape, generator=generator) > 0.4, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def projector(x: torch.Tensor, c: float = 1.0) -> torch.Tensor:
    """(I + M / c)^-1, M the second moment of the rows of x over its mean diagonal."""
    moment = x.double().T @ x.double()
    moment = moment / moment.diagonal().mean()
    return torch.linalg.inv(torch.eye(len(moment), dtype=torch.float64) + moment / c)


def backward(network: nn.Module, seed: int = 7) -> None:
    network(vectors(seed)).square().sum().backward()


class SignSGD(torch.optim.Optimizer):
    """Lion without momentum, written by a user."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, {"lr": RATE})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param -= group["lr"] * param.grad.sign()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=RATE, momentum=0.9, weight_decay=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=RATE, weight_decay=0.1),
    "adafactor": lambda params: Adafactor(params, lr=RATE, relative_step=False, scale_parameter=False),
    "sign": SignSGD,
}


# Directions.


@pytest.mark.parametrize("apply_to", ["gradient", "update", "both"])
def test_directions_sgd_step_equals_formula(apply_to: Any) -> None:
    network = small_network()
    protector = Protector(network, apply_to=apply_to, half_saturation=0.5)
    protector.measure([vectors(1), vectors(2, 3)])
    earlier = torch.cat((vectors(1), vectors(2, 3)))
    first = projector(earlier, 0.5)
    second = projector(torch.tanh(network[0](earlier)).detach(), 0.5)
    before = {name: value.detach().double() for name, value in network.named_parameters()}
    backward(network)
    gradients = {name: value.grad.double() for name, value in network.named_parameters()}  # type: ignore[union-attr]
    protector.wrap(torch.optim.SGD(network.parameters(), lr=RATE)).step()
    power = 2 if apply_to == "both" else 1
    for name, p in (("0.weight", first), ("2.weight", second)):
        expected = before[name] - RATE * gradients[name] @ torch.linalg.matrix_power(p, power)
        torch.testing.assert_close(network.get_parameter(name).detach().double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(network[0].bias.double(), before["0.bias"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_directions_mask_update_of_any_optimizer(optimizer: str) -> None:
    network, plain = small_network(), small_network()
    protector = Protector(network, apply_to="update", freeze_unmasked=False)
    protector.measure([vectors(1)])
    masked = protector.wrap(OPTIMIZERS[optimizer](network.parameters()))
    unmasked = OPTIMIZERS[optimizer](plain.parameters())
    p = projector(vectors(1))
    for seed in range(3):
        # From the same weights, so that only this step's mask is seen; the optimizer's state is that of both.
        plain.load_state_dict(network.state_dict())
        before = network[0].weight.detach().double().clone()
        for module in (network, plain):
            module.zero_grad()
            backward(module, seed)
        masked.step()
        unmasked.step()
        update = plain[0].weight.detach().double() - before
        torch.testing.assert_close(network[0].weight.detach().double(), before + update @ p, rtol=0, atol=1e-6)
        torch.testing.assert_close(network[0].bias, plain[0].bias)


def test_directions_gradient_mask_masks_decoupled_decay() -> None:
    network = small_network()
    protector = Protector(network, apply_to="gradient")
    protector.measure([vectors(1)])
    before = network[0].weight.detach().double().clone()
    optimizer = protector.wrap(torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.5))
    (0.0 * network(vectors(3))).sum().backward()
    optimizer.step()
    expected = before - RATE * 0.5 * before @ projector(vectors(1))
    torch.testing.assert_close(network[0].weight.detach().double(), expected, rtol=0, atol=1e-6)


def test_directions_second_measurement_adds_to_first() -> None:
    network = small_network()
    apart = []
    for seed in (1, 2):
        protector = Protector(network)
        protector.measure([vectors(seed)])
        apart.append(protector.state_dict()["tensors"])
    protector = Protector(network)
    for seed in (1, 2):
        protector.measure([vectors(seed)])
    for name, moment in protector.state_dict()["tensors"].items():
        assert torch.equal(moment, apart[0][name] + apart[1][name])


def test_directions_renewed_mask_acts_on_next_step() -> None:
    network = small_network()
    protector = Protector(network, apply_to="update", freeze_unmasked=False)
    optimizer = protector.wrap(torch.optim.SGD(network.parameters(), lr=RATE))
    assert protector.is_empty
    backward(network)
    gradient = network[0].weight.grad.double()

    def update() -> torch.Tensor:
        before = network[0].weight.detach().double().clone()
        optimizer.step()
        return network[0].weight.detach().double() - before

    torch.testing.assert_close(update(), -RATE * gradient, rtol=0, atol=1e-6)
    protector.measure([vectors(1)])
    torch.testing.assert_close(update(), -RATE * gradient @ projector(vectors(1)), rtol=0, atol=1e-6)
    protector.unwrap()
    torch.testing.assert_close(update(), -RATE * gradient, rtol=0, atol=1e-6)


def test_directions_every_optimizer_that_was_passed_is_masked() -> None:
    network, plain = small_network(), small_network()
    protector = Protector(network, apply_to="update", freeze_unmasked=False)
    protector.measure([vectors(1)])
    masked = [protector.wrap(torch.optim.SGD(layer.parameters(), lr=RATE)) for layer in (network[0], network[2])]
    # The same one again is masked once.
    protector.wrap(masked[0])
    for module in (network, plain):
        backward(module)
    for optimizer in masked:
        optimizer.step()
    torch.optim.SGD(plain.parameters(), lr=RATE).step()
    reached = torch.tanh(small_network()[0](vectors(1))).detach()
    start = small_network()
    for number, p in ((0, projector(vectors(1))), (2, projector(reached))):
        before = start[number].weight.detach().double()
        expected = before + (plain[number].weight.detach().double() - before) @ p
        torch.testing.assert_close(network[number].weight.detach().double(), expected, rtol=0, atol=1e-6)


def test_directions_what_stays_is_what_was_loaded_since() -> None:
    network = small_network()
    protector = Protector(network)
    protector.measure([vectors(1)])
    optimizer = protector.wrap(torch.optim.SGD(network.parameters(), lr=RATE))
    backward(network)
    optimizer.step()
    loaded = {name: value + 1 for name, value in network.state_dict().items()}
    network.load_state_dict(loaded)
    backward(network, 8)
    optimizer.step()
    assert torch.equal(network[0].bias, loaded["0.bias"]) and torch.equal(network[2].bias, loaded["2.bias"])


def test_directions_gradients_put_in_place_without_backward_are_masked() -> None:
    network = small_network()
    protector = Protector(network, apply_to="gradient")
    protector.measure([vectors(1)])
    optimizer = protector.wrap(torch.optim.SGD(network.parameters(), lr=RATE))
    backward(network)
    optimizer.step()
    before = network[0].weight.detach().double().clone()
    gradients = torch.autograd.grad(network(vectors(3)).square().sum(), list(network.parameters()))
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    protector.mask_gradients()
    # Clipping out of place is no new gradient.
    network[0].weight.grad = network[0].weight.grad / 2
    optimizer.step()
    expected = before - RATE / 2 * gradients[0].double() @ projector(vectors(1))
    torch.testing.assert_close(network[0].weight.detach().double(), expected, rtol=0, atol=1e-6)


def test_directions_gradient_mask_of_decay_that_begins_later() -> None:
    network = small_network()
    protector = Protector(network, apply_to="gradient")
    protector.measure([vectors(1)])
    optimizer = protector.wrap(torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.0))
    (0.0 * network(vectors(3))).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = 0.5
    before = network[0].weight.detach().double().clone()
    optimizer.step()
    expected = before - RATE * 0.5 * before @ projector(vectors(1))
    torch.testing.assert_close(network[0].weight.detach().double(), expected, rtol=0, atol=1e-6)


def test_directions_compiled_step_is_masked() -> None:
    network, compiled = small_network(), small_network()
    for module in (network, compiled):
        protector = Protector(module)
        protector.measure([vectors(1)])
        optimizer = protector.wrap(torch.optim.SGD(module.parameters(), lr=RATE))
        step = torch.compile(lambda: optimizer.step(), backend="eager") if module is compiled else optimizer.step  # noqa: B023
        backward(module)
        step()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), compiled.parameters(), strict=True))


def test_directions_padding_and_unlabeled_positions_do_not_count() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    batch = text(3)
    padded = {key: functional.pad(value, (0, 4), value=-100 if key == "labels" else 0) for key, value in batch.items()}
    moments = []
    for data in (batch, padded):
        protector = Protector(model)
        protector.measure([data])
        moments.append(protector.state_dict()["tensors"])
    for name, moment in moments[0].items():
        torch.testing.assert_close(moments[1][name], moment, rtol=1e-5, atol=1e-6)
    # The head reads all positions, of which those that predict count.
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, :5] = -100
    protector = Protector(model)
    protector.measure([batch])
    hidden = model.base_model(input_ids=batch["input_ids"]).last_hidden_state[:, 4:-1].flatten(0, 1).detach()
    expected = hidden.T @ hidden
    found = protector.state_dict()["tensors"]["lm_head.weight"]
    torch.testing.assert_close(found, expected / expected.diagonal().mean(), rtol=1e-5, atol=1e-5)


def test_causal_encoder_is_measured_with_its_own_loss() -> None:
    config = AutoConfig.for_model("bert", **CONFIGS["bert"], **NO_DROPOUT, is_decoder=True, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config).eval()
    batch = text(3)
    found, expected = Protector(model, "parameter"), Protector(model, "parameter", loss=lambda net, b: net(**b).loss)
    for protector in (found, expected):
        protector.measure([batch])
    for name, values in expected.state_dict()["tensors"].items():
        # In 255ths, which may be rounded the other way.
        torch.testing.assert_close(found.state_dict()["tensors"][name].int(), values.int(), rtol=0, atol=1)
    # A position predicts the next token.
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, :5] = -100
    directions = Protector(model)
    directions.measure([batch])
    hidden = model.base_model(input_ids=batch["input_ids"]).last_hidden_state[:, 4:-1].flatten(0, 1).detach()
    moment = hidden.T @ hidden
    head = directions.state_dict()["tensors"]["cls.predictions.transform.dense.weight"]
    torch.testing.assert_close(head, moment / moment.diagonal().mean(), rtol=1e-5, atol=1e-5)


def test_directions_adapters_of_peft_are_masked() -> None:
    model: Any = get_peft_model(
        tiny_model("llama"), LoraConfig(r=3, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)
    )
    protector = Protector(model)
    protector.measure([text(1)])
    assert len(protector.state_dict()["tensors"]) == 8
    optimizer = protector.wrap(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE))
    model(**text(2)).loss.backward()
    optimizer.step()


def test_directions_classifier_and_tied_head() -> None:
    config = AutoConfig.for_model("roberta", **CONFIGS["roberta"], num_labels=3)
    classifier = AutoModelForSequenceClassification.from_config(config)
    protector = Protector(classifier)
    batch = {**text(1), "labels": torch.tensor([0, 1, 2, 0])}
    protector.measure([batch])
    assert "classifier.out_proj.weight" in protector.state_dict()["tensors"]
    parameter = Protector(classifier, "parameter")
    parameter.measure([batch])
    assert parameter.state_dict()["tensors"]["classifier.out_proj.weight"].any()


# Importance of weights and units.


def test_parameter_sgd_step_is_scaled_by_importance() -> None:
    network = small_network()

    def loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().sum()

    protector = Protector(network, "parameter", loss=loss)
    batches = [vectors(1), vectors(2)]
    protector.measure(batches)
    sums: dict[str, torch.Tensor] = {}
    for batch in batches:
        gradients = torch.autograd.grad(loss(network, batch), list(network.parameters()))
        for (name, _), gradient in zip(network.named_parameters(), gradients, strict=True):
            sums[name] = sums.get(name, 0.0) + gradient.abs().double()
    before = {name: value.detach().double() for name, value in network.named_parameters()}
    backward(network)
    protector.wrap(torch.optim.SGD(network.parameters(), lr=RATE)).step()
    for name, value in network.named_parameters():
        importance = ((sums[name] - sums[name].mean()) / sums[name].std(correction=0)).tanh().abs()
        expected = before[name] - RATE * (1 - importance) * value.grad.double()  # type: ignore[union-attr]
        # Importance is stored in 255ths.
        atol = RATE * float(value.grad.abs().max()) / 255  # type: ignore[union-attr]
        torch.testing.assert_close(value.detach().double(), expected, rtol=0, atol=atol)


def test_parameter_loss_may_be_negative() -> None:
    network = small_network()
    measured = []
    for shift in (0.0, -100.0):
        protector = Protector(network, "parameter", loss=lambda model, batch, s=shift: model(batch).square().sum() + s)
        protector.measure([vectors(1)])
        measured.append(protector.state_dict()["tensors"])
    assert all(torch.equal(measured[1][name], values) for name, values in measured[0].items())
    assert measured[0]["0.weight"].any()


@pytest.mark.parametrize("method", METHODS)
def test_measuring_without_gradients_around_it(method: Any) -> None:
    model = tiny_model("llama")
    measured = []
    for around in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        protector = Protector(model, method)
        with around():
            protector.measure([{name: value + 0 for name, value in text(1).items()}])
        measured.append(protector.state_dict()["tensors"])
    for found in measured[1:]:
        assert all(torch.equal(found[name], values) for name, values in measured[0].items())


@pytest.mark.parametrize("model_type", ["roberta", "llama"])
def test_unit_of_importance_one_keeps_its_weights(model_type: str) -> None:
    model = tiny_model(model_type)
    protector = Protector(model, "unit")
    batch = text(1, causal=model_type == "llama")
    protector.measure([batch, text(2, num_rows=2, causal=model_type == "llama")])
    state = protector.state_dict()
    assert {name: values.shape[0] for name, values in state["tensors"].items()} == dict.fromkeys(state["tensors"], 2)
    assert all(0 < values.max() <= 1 and values.min() >= 0 for values in state["tensors"].values())
    layer = next(name for name, _ in model.named_parameters() if "layer.0.intermediate" in name or "0.mlp.up" in name)
    state["tensors"]["intermediate"][0] = torch.tensor([1.0] * 20 + [0.0] * 20)
    protector.load_state_dict(state)
    before = model.get_parameter(layer).detach().clone()
    optimizer = protector.wrap(torch.optim.AdamW(model.parameters(), lr=RATE))
    model(**batch).loss.backward()
    optimizer.step()
    after = model.get_parameter(layer)
    assert torch.equal(after[:20], before[:20]) and (after[20:] != before[20:]).any(dim=1).all()


def test_unit_table_of_own_architecture() -> None:
    table = {
        "objective": "clm",
        "units": {"intermediate": "intermediate_size"},
        "rules": [{"group": "intermediate", "parameter": "model.layers.{layer}.mlp.up_proj.weight", "axis": 0}],
        "sites": [{"group": "intermediate", "module": "model.layers.{layer}.mlp.down_proj", "position": "input"}],
        "unmasked": ["*"],
        "lm_head": ["lm_head"],
    }
    protector = Protector(tiny_model("llama"), "unit", architecture=table)
    protector.measure([text(1)])
    assert list(protector.state_dict()["tensors"]) == ["intermediate"]
    with pytest.raises(ConfigError, match=r"groups: found head, .* allowed: intermediate, unowned"):
        Protector(tiny_model("llama"), "unit", architecture=table, groups=["head"])
    with pytest.raises(ConfigError, match=r"architecture\.objective"):
        Protector(tiny_model("llama"), "unit", architecture={**table, "objective": "both"})


# Gradients and clipping.


def test_mask_gradients_acts_once_between_two_backward_passes() -> None:
    network = small_network()
    protector = Protector(network, apply_to="gradient")
    protector.measure([vectors(1)])
    optimizer = protector.wrap(torch.optim.SGD(network.parameters(), lr=RATE))
    backward(network)
    gradient = network[0].weight.grad.double().clone()
    masked = gradient @ projector(vectors(1))
    protector.mask_gradients()
    torch.testing.assert_close(network[0].weight.grad.double(), masked, rtol=0, atol=1e-5)
    norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    state = copy.deepcopy(network.state_dict())
    before = state["0.weight"].double()
    protector.mask_gradients()
    optimizer.step()
    expected = before - RATE * masked / (norm.double() + 1e-6)
    torch.testing.assert_close(network[0].weight.detach().double(), expected, rtol=0, atol=1e-6)
    # A step that a gradient scaler skips leaves the next gradients to be masked.
    protector.mask_gradients()
    network.zero_grad()
    network.load_state_dict(state)
    backward(network)
    protector.mask_gradients()
    torch.testing.assert_close(network[0].weight.grad.double(), masked, rtol=0, atol=1e-5)


def test_parameters_without_gradient_are_left_out() -> None:
    network = nn.ModuleDict({"used": nn.Linear(5, 4), "idle": nn.Linear(5, 2)})

    def run(model: Any, batch: torch.Tensor) -> torch.Tensor:
        return torch.cat((model["used"](batch), model["idle"](batch)), dim=1)

    protector = Protector(network, forward=run)
    protector.measure([vectors(1)])
    optimizer = protector.wrap(torch.optim.AdamW(network.parameters(), lr=RATE))
    before = network["idle"].weight.detach().clone()
    network["used"](vectors(2)).sum().backward()
    optimizer.step()
    assert torch.equal(network["idle"].weight, before)


# Files and states.


@pytest.mark.parametrize("method", ["directions", "unit", "parameter"])
def test_saved_protection_gives_same_steps(method: Any, tmp_path: Path) -> None:
    model = tiny_model(**NO_DROPOUT)
    twin = copy.deepcopy(model)
    protector = Protector(model, method)
    protector.measure([text(1, causal=False)])
    protector.save(tmp_path / "p.safetensors")
    loaded = Protector(twin, method)
    loaded.load(tmp_path / "p.safetensors")
    for module, owner in ((model, protector), (twin, loaded)):
        optimizer = owner.wrap(torch.optim.AdamW(module.parameters(), lr=RATE))
        for seed in range(2):
            module(**text(seed, causal=False)).loss.backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_training_resumes_bitwise(tmp_path: Path) -> None:
    def train(network: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            backward(network, seed)
            optimizer.step()

    whole = small_network()
    protector = Protector(whole)
    protector.measure([vectors(1)])
    optimizer = protector.wrap(torch.optim.AdamW(whole.parameters(), lr=RATE))
    train(whole, optimizer, range(2))
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), protector.state_dict()))
    train(whole, optimizer, range(2, 4))
    resumed = small_network()
    resumed.load_state_dict(saved[0])
    again = torch.optim.AdamW(resumed.parameters(), lr=RATE)
    again.load_state_dict(saved[1])
    second = Protector(resumed)
    second.trace(vectors(1))
    second.load_state_dict(saved[2])
    train(resumed, second.wrap(again), range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_files_are_those_of_das_ds(tmp_path: Path) -> None:
    model = tiny_model()
    layout = spec_for("roberta").layout(model)
    protectors = {method: Protector(model, method) for method in METHODS}  # type: ignore[arg-type]
    for method, protector in protectors.items():
        protector.measure([text(1, causal=False)])
        protector.save(tmp_path / method)
    tensors = {method: protector.state_dict()["tensors"] for method, protector in protectors.items()}
    widths = {name: len(moment) for name, moment in tensors["directions"].items()}
    moments, num_tokens = load_directions(tmp_path / "directions", widths, widths, layout, ("a", "b"))
    assert num_tokens == 0 and all(torch.equal(moments[name], tensors["directions"][name]) for name in widths)
    units = load_unit_importance(tmp_path / "unit", layout)
    assert all(torch.equal(units[group], tensors["unit"][group]) for group in units)
    with load_parameter_importance(tmp_path / "parameter", layout) as read:
        assert all(torch.equal(read(n, 0, len(v)), v) for n, v in tensors["parameter"].items())
    # And the other way round, with a vocabulary that is not compared.
    halved = {group: values / 2 for group, values in units.items()}
    save_unit_importance(tmp_path / "run", halved, layout, ("a", "b"))
    protectors["unit"].load(tmp_path / "run")
    assert all(torch.equal(v, halved[g]) for g, v in protectors["unit"].state_dict()["tensors"].items())


def test_rows_of_added_tokens_are_not_masked(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(280)
    model = tiny_model("llama", vocab_size=280, tie_word_embeddings=False)
    protector = Protector(model, tokenizer=tokenizer)
    protector.measure([text(1)])
    protector.save(tmp_path / "p.safetensors")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<new>"])
    model.resize_token_embeddings(281)
    grown, plain = Protector(model, apply_to="update", tokenizer=tokenizer), copy.deepcopy(model)
    grown.load(tmp_path / "p.safetensors")
    for module, optimizer in (
        (model, grown.wrap(torch.optim.SGD(model.parameters(), lr=RATE))),
        (plain, torch.optim.SGD(plain.parameters(), lr=RATE)),
    ):
        module(**text(2)).loss.backward()
        optimizer.step()
    head, full = model.lm_head.weight, plain.lm_head.weight
    assert torch.equal(head[280], full[280]) and not torch.equal(head[279], full[279])
    # Also where a state is loaded, as when training resumes.
    resumed = copy.deepcopy(model)
    again = Protector(resumed, apply_to="update", tokenizer=tokenizer)
    again.load_state_dict(grown.state_dict())
    before = resumed.lm_head.weight.detach().clone()
    resumed(**text(2)).loss.backward()
    gradient = resumed.lm_head.weight.grad.clone()
    again.wrap(torch.optim.SGD(resumed.parameters(), lr=RATE)).step()
    torch.testing.assert_close(resumed.lm_head.weight[280], before[280] - RATE * gradient[280], rtol=0, atol=1e-6)
    with pytest.raises(ImportanceError, match="importance of another tokenizer"):
        Protector(model, tokenizer=tiny_tokenizer(270)).load(tmp_path / "p.safetensors")


# Wrappers.


def test_wrappers_are_taken_off() -> None:
    network = small_network()
    assert unwrap_model(nn.DataParallel(network)) is network
    compiled = torch.compile(network)
    assert unwrap_model(compiled) is network  # type: ignore[arg-type]

    class FullyShardedDataParallel(nn.Module):
        pass

    with pytest.raises(ModelError, match=r"model: found one that FSDP shards, expected .* DeepSpeed engine"):
        Protector(FullyShardedDataParallel())


def test_plain_torch_does_not_load_deepspeed() -> None:
    code = (
        "import sys, torch\nfrom torch import nn\nfrom das_ds.integrations import Protector\n"
        "network = nn.Linear(3, 2)\nprotector = Protector(network)\nprotector.measure([torch.randn(4, 3)])\n"
        "optimizer = protector.wrap(torch.optim.SGD(network.parameters(), lr=0.1))\n"
        "network(torch.randn(4, 3)).sum().backward()\noptimizer.step()\nsys.exit('deepspeed' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


# Errors.


def transposed() -> nn.Module:
    network = nn.Linear(5, 4)
    network.weight = nn.Parameter(torch.randn(5, 4).T)
    return network


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def build_and_measure(model: nn.Module, method: Any, data: Any, **settings: Any) -> None:
    Protector(model, method, **settings).measure(data)


@pytest.mark.parametrize(
    ("error", "message", "run"),
    [
        (ConfigError, "method: found 'ewc', allowed: directions | unit | parameter",
         lambda: Protector(small_network(), "ewc")),  # type: ignore[arg-type]
        (ConfigError, "rate: found with method directions, which has no such setting; allowed: apply_to",
         lambda: Protector(small_network(), rate=1)),
        (ConfigError, "half_saturation: found -1; Input should be greater than 0",
         lambda: Protector(small_network(), half_saturation=-1)),
        (ConfigError, "apply_to: found first_moment",
         lambda: Protector(small_network(), "parameter", apply_to="first_moment")),
        (ConfigError, "include_consumers: found true with method parameter",
         lambda: Protector(small_network(), "parameter", include_consumers=True)),
        (ModelError, "model: found no trained parameter in Sequential",
         lambda: Protector(small_network().requires_grad_(False))),
        (ModelError, "0.weight: found weights in bfloat16, .* expected float32",
         lambda: Protector(small_network().bfloat16())),
        (ModelError, "weight: found a tensor of strides", lambda: Protector(transposed())),
        (ModelError, "model: found Sequential, which has no table of units",
         lambda: Protector(small_network(), "unit")),
        (ModelError, "method: found directions, but weight .* is a matrix of a kind of layer that has no directions",
         lambda: build_and_measure(nn.Conv2d(2, 3, 2), "directions", [torch.randn(1, 2, 4, 4)])),
        (ModelError, "unused.weight: found no call of its layer",
         lambda: build_and_measure(Unused(), "directions", [vectors(1)])),
        (ModelError, "model: found no trained linear layer in LayerNorm",
         lambda: build_and_measure(nn.LayerNorm(5), "directions", [vectors(1)])),
        (DataError, "dataloader: found a generator, which can be read once",
         lambda: build_and_measure(small_network(), "directions", (v for v in [vectors(1)]))),
        (DataError, "dataloader: found no batch", lambda: build_and_measure(small_network(), "directions", [])),
        (DataError, "loss: found an output of Sequential without loss",
         lambda: build_and_measure(small_network(), "parameter", [vectors(1)])),
        (DataError, "loss: found LlamaForCausalLM with batches of input_ids, expected",
         lambda: build_and_measure(tiny_model("llama"), "unit", [{"input_ids": text(1)["input_ids"]}])),
        (TrainingError, "found an input of 0.weight that is not finite",
         lambda: build_and_measure(small_network(), "directions", [vectors(1) / 0])),
        (ImportanceError, "save: found nothing that is protected",
         lambda: Protector(small_network()).save("p.safetensors")),
        (ImportanceError, "load: found a model that reads no token ids",
         lambda: Protector(small_network()).load("p.safetensors")),
        (ImportanceError, "p.safetensors: cannot read directions",
         lambda: Protector(tiny_model()).load("/nowhere/p.safetensors")),
        (ImportanceError, "state_dict: found method unit, expected directions",
         lambda: Protector(small_network()).load_state_dict({"method": "unit"})),
        (ImportanceError, "state_dict: found no tensors by name in tensors",
         lambda: Protector(small_network()).load_state_dict({"method": "directions"})),
        (ImportanceError, "state_dict: found no tensors by name in tensors",
         lambda: Protector(small_network()).load_state_dict({"method": "directions", "tensors": {"x": 1}})),
        (ImportanceError, "state_dict: found a NoneType",
         lambda: Protector(small_network()).load_state_dict(None)),  # type: ignore[arg-type]
        (ConfigError, "Protector: found a copy or a pickle", lambda: copy.deepcopy(Protector(small_network()))),
        (TrainingError, "found a loss or a gradient that is not finite",
         lambda: build_and_measure(
             small_network(), "parameter", [vectors(1), vectors(2) / 0], loss=lambda model, x: model(x).sum()
         )),
    ],
)  # fmt: skip
def test_bad_input_is_an_error(error: type[DasError], message: str, run: Callable[[], None]) -> None:
    with pytest.raises(error, match=message.replace("|", r"\|")) as raised:
        run()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("method", ["directions", "unit", "parameter"])
def test_protection_of_another_model_is_an_error(method: Any, tmp_path: Path) -> None:
    protector = Protector(tiny_model(), method)
    protector.measure([text(1, causal=False)])
    protector.save(tmp_path / "p.safetensors")
    state = protector.state_dict()
    other = Protector(tiny_model(intermediate_size=32), method)
    with pytest.raises(ImportanceError, match="importance of another model"):
        other.load(tmp_path / "p.safetensors")
    with pytest.raises(ImportanceError, match=r"state_dict: found \(.*\) for .*, expected \(.*\); it is of another"):
        other.load_state_dict(state)
    another = {"directions": "unit", "unit": "parameter", "parameter": "directions"}[method]
    with pytest.raises(ImportanceError, match="importance by"):
        Protector(tiny_model(), another).load(tmp_path / "p.safetensors")  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written"):
        protector.save(tmp_path / "file" / "p.safetensors")


def test_empty_state_protects_nothing() -> None:
    for method in ("directions", "parameter"):
        protector = Protector(small_network(), method, loss=lambda model, batch: model(batch).square().sum())  # type: ignore[arg-type]
        protector.measure([vectors(1)])
        protector.load_state_dict(Protector(small_network(), method).state_dict())  # type: ignore[arg-type]
        assert protector.is_empty


def test_steps_that_masks_would_not_reach_are_errors() -> None:
    network = small_network()
    network[0].requires_grad_(False)
    protector = Protector(network)
    protector.measure([vectors(1)])
    optimizer = protector.wrap(torch.optim.SGD(network[2].parameters(), lr=RATE))
    second = Protector(network)
    with pytest.raises(
        ConfigError, match=r"optimizer: found SGD whose steps another Protector masks.* expected unwrap"
    ):
        second.wrap(optimizer)
    protector.unwrap()
    second.wrap(optimizer)
    second.unwrap()
    protector.wrap(optimizer)
    network[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(network[0].parameters())})
    backward(network)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ConfigError, match=r"found a gradient of a tensor of shape \(4, 5\) that was no trained"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network = small_network()
    optimizer = Protector(network).wrap(torch.optim.SGD(network.parameters(), lr=RATE))
    network.bfloat16()(vectors(1).bfloat16()).sum().backward()
    with pytest.raises(ModelError, match=r"0\.weight: found weights in bfloat16"):
        optimizer.step()


def test_wrong_optimizer_is_an_error() -> None:
    network = small_network()
    protector = Protector(network, apply_to="gradient")
    protector.measure([vectors(1)])
    with pytest.raises(ConfigError, match=r"optimizer: found 4 of its 4 tensors, .* expected an optimizer of model"):
        protector.wrap(torch.optim.SGD(small_network().parameters(), lr=RATE))
    with pytest.raises(ConfigError, match=r"optimizer: found object, expected a torch\.optim\.Optimizer"):
        protector.wrap(object())
    optimizer = protector.wrap(torch.optim.SGD(network.parameters(), lr=RATE))
    with pytest.raises(ConfigError, match=r"optimizer: found a closure in SGD\.step"):
        optimizer.step(lambda: 0.0)
    optimizer = protector.wrap(torch.optim.SGD(network.parameters(), lr=RATE, weight_decay=0.1))
    backward(network)
    with pytest.raises(ConfigError, match=r"apply_to: found gradient with SGD, .* expected both or update"):
        protector.mask_gradients()

    class Lion(SignSGD):
        pass

    protector.unwrap()
    optimizer = protector.wrap(Lion(network.parameters()))
    with pytest.raises(ConfigError, match=r"apply_to: found gradient with Lion, which steps by the sign"):
        protector.mask_gradients()
