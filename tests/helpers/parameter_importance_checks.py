"""Parameter-level importance against brute force and plain autograd."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.importance import joined_batches
from helpers.parameter_importance import (
    joined,
    measured_all,
    random_weights_importance,
    read_and_write,
    save_random_weights_importance,
)
from helpers.parity import EPS, NUM_STEPS, ROWS, parity_configs, relative_difference, steps
from helpers.reference import fix_noise, full_masks, reference_batch_gradients, reference_train
from helpers.run_ranks import run_ranks
from helpers.tiny_models import NO_DROPOUT, tiny_model
from helpers.training import LENGTH, run_config, train_all

NUM_GLOBAL_BATCHES = 2
ACCUMULATION = 2
MICRO_ROWS = 4
# Each form of normalization over another sum.
MEASURES = (("abs_grad", "abs_tanh"), ("squared_grad", "tanh_positive"), ("grad_x_weight", "abs_tanh"))
Weights = dict[str, torch.Tensor]


def global_batches() -> list[Any]:
    batches = joined_batches(NUM_GLOBAL_BATCHES * ACCUMULATION, MICRO_ROWS)
    return [batches[i : i + ACCUMULATION] for i in range(0, len(batches), ACCUMULATION)]


@cache
def brute_force(kind: str) -> dict[str, Weights]:
    """Sums over the global batches, by what is summed."""
    model = tiny_model(**NO_DROPOUT).double()
    batches = [batch for step in global_batches() for batch in step]
    inputs = torch.cat([batch.input_ids for batch in batches])
    labels = torch.full_like(inputs, -100)
    for index, batch in enumerate(batches):
        labels[index * MICRO_ROWS : (index + 1) * MICRO_ROWS].view(-1)[batch.predicted] = batch.targets
    if kind == "proxy":
        fix_noise(model, 2 * len(inputs), LENGTH)
    corrupted = torch.cat([batch.corrupted_ids for batch in batches])
    batch_size = ACCUMULATION * MICRO_ROWS
    gradients = reference_batch_gradients(model, inputs, corrupted, labels, kind, batch_size)  # type: ignore[arg-type]
    sums: dict[str, Weights] = {summed: {} for summed, _ in MEASURES}
    for name, weight in model.named_parameters():
        parts = torch.stack([batch[name] for batch in gradients])
        sums["abs_grad"][name] = parts.abs().sum(0)
        sums["squared_grad"][name] = parts.pow(2).sum(0)
        sums["grad_x_weight"][name] = (parts * weight.detach()).abs().sum(0)
    return sums


def normalized(magnitudes: torch.Tensor, form: str) -> torch.Tensor:
    """tanh of the standardized values of one tensor, spelled out."""
    if magnitudes.max() == magnitudes.min():
        return torch.zeros_like(magnitudes)
    z = (magnitudes - magnitudes.mean()) / magnitudes.var(correction=0).sqrt()
    return z.tanh().abs() if form == "abs_tanh" else z.clamp_min(0).tanh()


def unit_means(weights: Weights) -> dict[str, torch.Tensor]:
    """Mean of the weights that each unit owns, found by masking nothing but that unit."""
    model = tiny_model()
    sizes = {"head": 3, "intermediate": 40, "output": 24}
    means = {group: torch.zeros(2, units) for group, units in sizes.items()}
    for group, values in means.items():
        for layer, unit in torch.cartesian_prod(*(torch.arange(n) for n in values.shape)).tolist():
            only = {g: torch.zeros(2, units) for g, units in sizes.items()}
            only[group][layer, unit] = 1.0
            owned = [weights[name][scale == 0] for name, scale in full_masks(model, only).items()]
            values[layer, unit] = torch.cat(owned).mean()
    return means


def settings(folder: Path, world_size: int, zero: dict[str, Any], precision: str = "fp32") -> list[Any]:
    train = {"micro_batch_size": MICRO_ROWS // world_size, "global_batch_size": 8, "precision": precision}
    # Clipping this low would show in every sum.
    train["max_grad_norm"] = 1e-3
    return [
        run_config(
            folder,
            train={**run_config(folder).train.model_dump(), **train},
            deepspeed={"zero_optimization": zero},
            method={"importance": {"granularity": "parameter", "normalization": form, "score": summed}},
        )
        for summed, form in MEASURES
    ]


def check(results: list[Any], kind: str, tolerance: float) -> None:
    shapes = {name: weight.shape for name, weight in tiny_model().named_parameters()}
    for number, (summed, form) in enumerate(MEASURES):
        sums = joined([rank[number][0] for rank in results], shapes)
        levels = joined([rank[number][1] for rank in results], shapes)
        for name, value in brute_force(kind)[summed].items():
            # The gradient of key biases is rounding alone: softmax ignores a constant added to all keys.
            if "key.bias" in name:
                continue
            allowed = tolerance * (2 if summed == "squared_grad" else 1)
            assert (sums[name] - value).abs().max() <= allowed * value.abs().max(), (summed, name)
            # What is stored belongs to the sums that were found, to within half of a 255th.
            error = (levels[name] / 255 - normalized(sums[name], form)).abs().max()
            assert error <= 1 / 510 + 1e-9, (name, error)
        means = unit_means({name: (value / 255).float() for name, value in levels.items()})
        for rank in results:
            for group, found in rank[number][2].items():
                torch.testing.assert_close(found, means[group], rtol=1e-5, atol=1e-6)


def check_sums_equal_brute_force(kind: str, stage: int, world_size: int, folder: Path) -> None:
    """Importance of a run on so many ranks."""
    runs = settings(folder, world_size, {"stage": stage})
    check(run_ranks(measured_all, world_size, runs, kind, global_batches(), NO_DROPOUT), kind, 1e-5)


@cache
def masked_reference(apply_to: str) -> Any:
    weights = {name: value.float() / 255 for name, value in random_weights_importance().items()}
    model = tiny_model(**NO_DROPOUT)
    return reference_train(
        model,
        [[vars(batch) for batch in step] for step in steps()],
        unit_means(weights),
        scales={name: 1 - value for name, value in weights.items()},
        learning_rates=[1e-2 * (NUM_STEPS - step) / NUM_STEPS for step in range(NUM_STEPS)],
        eps=EPS,
        max_grad_norm=0.5,
        apply_to=apply_to,  # type: ignore[arg-type]
        dtype=torch.float64,
    )


def check_training_equals_the_reference(zero: dict[str, Any], world_size: int, folder: Path) -> None:
    method = {"importance": {"granularity": "parameter", "init_from": str(save_random_weights_importance(folder))}}
    modes = ("update", "gradient")
    runs = parity_configs(folder, world_size, zero, [{**method, "softmask": {"apply_to": mode}} for mode in modes])
    assert runs[0].train.global_batch_size == ROWS * 2
    results = run_ranks(train_all, world_size, runs, steps(), NO_DROPOUT)
    start = dict(tiny_model().named_parameters())
    for mode, (weights, lines) in zip(modes, results[0], strict=True):
        expected = masked_reference(mode)
        assert relative_difference(weights, dict(expected.model.named_parameters())) <= 1e-5, mode
        assert [line["grad_norm"] for line in lines] == pytest.approx(expected.grad_norms, rel=1e-4)
        if mode == "update":
            for name, levels in random_weights_importance().items():
                held = levels == 255
                assert torch.equal(weights[name][held], start[name][held]), name


def check_files_are_read_and_written_by_any_number_of_ranks(world_size: int, stage: int, folder: Path) -> None:
    source = save_random_weights_importance(folder)
    train = {"micro_batch_size": 1, "global_batch_size": world_size, "precision": "fp32"}
    config = run_config(folder, train=train, deepspeed={"zero_optimization": {"stage": stage}})
    found = run_ranks(read_and_write, world_size, config, source, folder / "again.safetensors")
    first = load_file(source)
    again = load_file(folder / "again.safetensors")
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    expected = unit_means({name: value.float() / 255 for name, value in random_weights_importance().items()})
    for rank in found:
        for group, values in rank.items():
            torch.testing.assert_close(values, expected[group], rtol=1e-5, atol=1e-6)
