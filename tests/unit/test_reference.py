"""The reference agrees with Hugging Face, torch optimizers, finite differences and hand-computed values."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel, RobertaConfig, RobertaForMaskedLM

from tests.helpers import reference as ref

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}
KINDS: dict[str, tuple[Any, Any]] = {
    "roberta": (RobertaConfig, RobertaForMaskedLM),
    "bert": (BertConfig, BertForMaskedLM),
}


def tiny(kind: str = "roberta", dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config, model = KINDS[kind]
    built: PreTrainedModel = model(config(**SIZES)).to(dtype).eval()
    return built


def ids(*shape: int, seed: int = 1) -> Tensor:
    """Token ids above the special ones, so that none is padding."""
    return torch.randint(5, 100, shape, generator=torch.Generator().manual_seed(seed))


def batch(num_sequences: int = 4, num_predicted: int = 9, seed: int = 1) -> dict[str, Tensor]:
    input_ids = ids(num_sequences, 11, seed=seed)
    predicted = torch.randperm(input_ids.numel(), generator=torch.Generator().manual_seed(seed))[:num_predicted]
    corrupted = input_ids.flatten().index_fill(0, predicted, 4).view_as(input_ids)
    targets = input_ids.flatten()[predicted]
    return {"input_ids": input_ids, "corrupted_ids": corrupted, "predicted": predicted, "targets": targets}


def random_units(model: PreTrainedModel, seed: int = 0) -> ref.Units:
    generator = torch.Generator().manual_seed(seed)
    ones = ref.unit_ones(model)
    return {group: torch.rand(value.shape, generator=generator, dtype=value.dtype) for group, value in ones.items()}


def corrupted_sequences(num_sequences: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences, corrupted sequences and labels (-100 where nothing is predicted), each (N, S)."""
    sequences = ids(num_sequences, 11)
    hit = torch.rand(sequences.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    return sequences, sequences.masked_fill(hit, 4), sequences.masked_fill(~hit, -100)


def movement(before: PreTrainedModel, after: PreTrainedModel) -> dict[str, Tensor]:
    start = dict(before.named_parameters())
    return {name: (value - start[name]).detach() for name, value in after.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_open_gates_give_the_network_itself(kind: str) -> None:
    model = tiny(kind)
    input_ids = ids(2, 11)
    expected = model(input_ids=input_ids, output_hidden_states=True)
    hidden = ref.encode(model, input_ids, ref.unit_ones(model))
    torch.testing.assert_close(hidden, expected.hidden_states[-1])
    torch.testing.assert_close(ref.lm_logits(model, hidden), expected.logits)


def test_a_closed_gate_equals_removed_weights() -> None:
    model = tiny()
    input_ids = ids(2, 11)
    gates = ref.unit_ones(model)
    gates["head"][0, 1] = gates["intermediate"][1, 7] = gates["output"][0, 3] = 0.0
    gated = ref.encode(model, input_ids, gates)
    layers = ref.backbone(model).encoder.layer
    with torch.no_grad():
        layers[0].attention.output.dense.weight[:, 8:16] = 0
        layers[1].intermediate.dense.weight[7] = 0
        layers[1].intermediate.dense.bias[7] = 0
        layers[0].output.dense.weight[3] = 0
        layers[0].output.dense.bias[3] = 0
        torch.testing.assert_close(gated, model(input_ids=input_ids, output_hidden_states=True).hidden_states[-1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("group", "layer", "unit"), [("head", 0, 2), ("intermediate", 1, 39), ("output", 0, 23)])
def test_mlm_importance_is_the_finite_difference(kind: str, group: str, layer: int, unit: int) -> None:
    model = tiny(kind)
    (sequences, corrupted, labels) = corrupted_sequences()
    importance = ref.reference_importance(model, sequences, corrupted, labels)[group][layer, unit]
    total = 0.0
    for index in range(len(sequences)):
        values = []
        for step in (1e-5, -1e-5):
            gates = ref.unit_ones(model)
            gates[group][layer, unit] += step
            with torch.no_grad():
                logits = ref.lm_logits(model, ref.encode(model, corrupted[index : index + 1], gates)[0])
            values.append(torch.nn.functional.cross_entropy(logits, labels[index]).item())
        total += abs(values[0] - values[1]) / 2e-5
    assert importance.item() == pytest.approx(total / len(sequences), rel=1e-5)


def test_a_sequence_without_predicted_tokens_counts_with_zero() -> None:
    model = tiny()
    (sequences, corrupted, labels) = corrupted_sequences()
    labels[2] = -100
    with_empty = ref.reference_importance(model, sequences, corrupted, labels)
    without = ref.reference_importance(model, sequences[:2], corrupted[:2], labels[:2])
    for group, value in with_empty.items():
        torch.testing.assert_close(value, without[group] * 2 / 3)


def test_proxy_importance_follows_the_noise() -> None:
    model = tiny()
    (sequences, corrupted, labels) = corrupted_sequences()
    ref.fix_noise(model, 2 * len(sequences), 11)
    noisy = ref.reference_importance(model, sequences, corrupted, labels, kind="proxy")
    again = ref.reference_importance(model, sequences, corrupted, labels, kind="proxy")
    for module in model.modules():
        if isinstance(module, ref.FixedNoise):
            module.noise = torch.ones_like(module.noise)
    silent = ref.reference_importance(model, sequences, corrupted, labels, kind="proxy")
    for group in noisy:
        assert (noisy[group] > 0).any() and torch.equal(noisy[group], again[group])
        assert silent[group].abs().max() < 1e-12


def test_fixed_noise_gives_the_network_with_that_dropout() -> None:
    model = tiny()
    input_ids = ids(2, 11)
    clean = ref.encode(model, input_ids, ref.unit_ones(model))
    ref.fix_noise(model, 4, 11)
    ref.select_noise(model, [3, 1])
    noisy = ref.encode(model, input_ids, ref.unit_ones(model))
    torch.testing.assert_close(noisy, model(input_ids=input_ids, output_hidden_states=True).hidden_states[-1])
    ref.select_noise(model, [3])
    torch.testing.assert_close(noisy[:1], ref.encode(model, input_ids[:1], ref.unit_ones(model)))
    assert not torch.allclose(noisy, clean)


def test_hidden_kl_is_that_of_torch() -> None:
    first, second = torch.randn(2, 2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.kl_div(
        second.log_softmax(-1).flatten(0, 1), first.softmax(-1).flatten(0, 1), reduction="batchmean"
    )
    torch.testing.assert_close(ref.hidden_kl(first, second), expected)


def test_normalize_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [0.3, 0.3, 0.3]], dtype=torch.float64)
    extreme = math.tanh(math.sqrt(1.5))
    expected = torch.tensor([[extreme, 0.0, extreme], [0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(ref.normalize(values), expected)
    expected[0, 0] = 0.0
    torch.testing.assert_close(ref.normalize(values, "tanh_positive"), expected)


def test_masks_of_owned_and_shared_parameters() -> None:
    model = tiny()
    importance = random_units(model)
    layer = "roberta.encoder.layer.1"
    scales = ref.full_masks(model, importance, unowned_update_scale=0.25)
    keep = {group: 1 - value[1] for group, value in importance.items()}
    heads = keep["head"].repeat_interleave(8)
    assert scales.keys() == dict(model.named_parameters()).keys()
    for projection in ("query", "key", "value"):
        weight = scales[f"{layer}.attention.self.{projection}.weight"]
        torch.testing.assert_close(weight, heads[:, None].expand(24, 24))
        torch.testing.assert_close(scales[f"{layer}.attention.self.{projection}.bias"], heads)
    torch.testing.assert_close(scales[f"{layer}.attention.output.dense.weight"], heads[None, :].expand(24, 24))
    for part, size in (("intermediate", 24), ("output", 40)):
        weight = scales[f"{layer}.{part}.dense.weight"]
        torch.testing.assert_close(weight, keep[part][:, None].expand(-1, size))
        torch.testing.assert_close(scales[f"{layer}.{part}.dense.bias"], keep[part])
    for name, scale in scales.items():
        shared = (
            "embeddings" in name or "Norm" in name or "lm_head" in name or name.endswith("attention.output.dense.bias")
        )
        assert bool((scale == 0.25).all()) == shared, name


def test_readers_take_the_larger_importance() -> None:
    model = tiny()
    importance = random_units(model)
    scale = ref.full_masks(model, importance, include_consumers=True)["roberta.encoder.layer.0.output.dense.weight"]
    larger = torch.maximum(importance["output"][0][:, None], importance["intermediate"][0][None, :])
    torch.testing.assert_close(scale, 1 - larger)


def test_contrast_of_two_by_two_by_hand() -> None:
    full = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    positive = torch.tensor([[3.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    previous = torch.tensor([[0.0, 1.0], [-5.0, 0.0]], dtype=torch.float64)
    half = math.sqrt(0.5)
    first = math.exp(2) + math.exp(2 * half) + math.exp(0) + math.exp(-2)
    second = math.exp(0) + math.exp(2 * half) + math.exp(2) + math.exp(0)
    expected = (math.log(first) - 2 + math.log(second) - 2 * half) / 2
    assert ref.contrastive_loss(full, positive, previous, 0.5).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_unmasked_training_is_adamw_of_torch(kind: str) -> None:
    model = tiny(kind)
    steps = [[batch(seed=seed)] for seed in range(3)]
    rates = [1e-3, 2e-3, 1e-3]
    run = ref.reference_train(
        model, steps, None, learning_rates=rates, max_grad_norm=0.5, contrast_weight=0.0, dtype=torch.float64
    )
    weights = [value for value in model.parameters() if value.ndim > 1]
    vectors = [value for value in model.parameters() if value.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    for step, rate in enumerate(rates):
        only = steps[step][0]
        labels = torch.full((44,), -100).index_put((only["predicted"],), only["targets"]).view(4, 11)
        loss = model(input_ids=only["corrupted_ids"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        assert run.mlm_losses[step] == pytest.approx(loss.item(), rel=1e-9)
        assert run.grad_norms[step] == pytest.approx(norm.item(), rel=1e-9) and norm > 0.5
    for trained, expected in zip(run.model.parameters(), model.parameters(), strict=True):
        # The softmax cancels key biases: their gradient is rounding, which Adam blows up.
        torch.testing.assert_close(trained, expected, rtol=1e-9, atol=1e-10)


def test_update_mode_scales_the_whole_first_step() -> None:
    model = tiny()
    steps = [[batch(seed=1), batch(seed=2)]]
    importance = random_units(model)
    options: dict[str, Any] = {
        "learning_rates": [1e-3],
        "weight_decay": 0.1,
        "contrast_weight": 0.0,
        "dtype": torch.float64,
    }
    free = movement(model, ref.reference_train(model, steps, None, **options).model)
    masked = movement(model, ref.reference_train(model, steps, importance, **options).model)
    for name, scale in ref.full_masks(model, importance).items():
        torch.testing.assert_close(masked[name], free[name] * scale, rtol=1e-6, atol=1e-12)


def test_gradient_mode_masks_before_clipping_and_adam_cancels_it() -> None:
    model = tiny()
    steps = [[batch()]]
    importance = random_units(model)
    importance["output"][1, 5] = 1.0
    options: dict[str, Any] = {"learning_rates": [1e-3], "weight_decay": 0.0, "contrast_weight": 0.0, "eps": 1e-14}
    masked = ref.reference_train(model, steps, importance, apply_to="gradient", dtype=torch.float64, **options)
    free = ref.reference_train(model, steps, None, dtype=torch.float64, **options)
    assert masked.grad_norms[0] < free.grad_norms[0]
    name = "roberta.encoder.layer.1.output.dense.weight"
    moved = movement(model, masked.model)[name]
    unmasked = movement(model, free.model)[name]
    assert moved[5].abs().max() == 0 and unmasked[5].abs().min() > 0
    others = torch.arange(len(moved)) != 5
    torch.testing.assert_close(moved[others], unmasked[others], rtol=1e-6, atol=0.0)


def test_full_importance_protects_every_unit() -> None:
    model = tiny()
    steps = [[batch(seed=seed)] for seed in range(2)]
    run = ref.reference_train(model, steps, ref.unit_ones(model), learning_rates=[1e-3] * 2, unowned_update_scale=0.0)
    before = torch.nn.Module.to(copy.deepcopy(model), torch.float32)
    assert all(value.abs().max() == 0 for value in movement(before, run.model).values())


def test_accumulation_normalizes_by_all_predicted_tokens() -> None:
    model = tiny()
    parts = [batch(2, 9, seed=1), batch(2, 3, seed=2)]
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    joined["predicted"][9:] += parts[0]["input_ids"].numel()
    options: dict[str, Any] = {"learning_rates": [1e-3], "contrast_weight": 0.0, "dtype": torch.float64}
    split = ref.reference_train(model, [parts], None, **options)
    full = ref.reference_train(model, [[joined]], None, **options)
    assert split.mlm_losses == pytest.approx(full.mlm_losses, rel=1e-12)
    assert split.grad_norms == pytest.approx(full.grad_norms, rel=1e-9)


def test_contrast_is_averaged_over_micro_batches_and_weighted() -> None:
    model = tiny()
    parts = [batch(seed=1), batch(seed=2)]
    importance = random_units(model)
    options: dict[str, Any] = {"learning_rates": [1e-3], "weight_decay": 0.0, "dtype": torch.float64}
    both = ref.reference_train(model, [parts], importance, **options)
    single = [ref.reference_train(model, [[part]], importance, **options).contrast_losses[0] for part in parts]
    assert both.contrast_losses[0] == pytest.approx(sum(single) / 2, rel=1e-9)
    heavier = ref.reference_train(model, [parts], importance, contrast_weight=3.0, **options)
    assert heavier.contrast_losses == both.contrast_losses and heavier.grad_norms[0] != both.grad_norms[0]
