"""Teachers equal the model of their time bit for bit and are no larger than necessary; methods kd and derpp."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from das_ds.data.batch import Batch
from helpers.distillation import TeacherFacts, teach_and_train
from helpers.parity import EPS, NUM_STEPS, OFFLOAD, parity_configs, relative_difference, steps
from helpers.replay import DERPP, PlainBuffer
from helpers.run_ranks import run_ranks
from helpers.tiny_models import NO_DROPOUT, tiny_model

KD = {"name": "kd", "weight": 3.0, "temperature": 2.0}
# With a threshold of 0 every parameter is divided, with 30 vectors of up to that size are not divided.
THRESHOLDS = (0, 30)


def expected_elements(stage: int, num_ranks: int, threshold: int) -> int:
    sizes = [weight.numel() for weight in tiny_model().parameters()]
    if stage < 3:
        return sum(sizes)
    return sum(-(-size // num_ranks) + (size if size <= threshold else 0) for size in sizes)


Losses = tuple[torch.Tensor, ...]
Reference = tuple[dict[str, torch.Tensor], list[list[float]]]
"""Weights at the end, and per step all losses."""


def trained(
    compute_losses: Callable[[PreTrainedModel], Callable[[PreTrainedModel, list[Batch]], Losses]],
    steps: list[list[Batch]],
) -> Reference:
    """Plain torch in float64 on one process.

    Args:
        compute_losses: first model -> (model, joined micro-batches of a step) -> all losses.
        steps: joined micro-batches of every step.
    """
    model = tiny_model(**NO_DROPOUT).double()
    method = compute_losses(model)
    parameters = dict(model.named_parameters())
    matrices, vectors = ([p for p in parameters.values() if (p.dim() > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, eps=EPS)
    lines = []
    for number, step in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (NUM_STEPS - number) / NUM_STEPS
        losses = method(model, step)
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 0.5)
        optimizer.step()
        lines.append([loss.item() for loss in losses])
    return {name: value.detach() for name, value in parameters.items()}, lines


def _token_loss(model: PreTrainedModel, step: list[Batch]) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for batch in step:
        logits = model(input_ids=batch.corrupted_ids).logits.flatten(0, 1)[batch.predicted]
        total = total + functional.cross_entropy(logits, batch.targets, reduction="sum")
    return total / sum(batch.num_predicted for batch in step)


def _distillation(first: PreTrainedModel) -> Callable[[PreTrainedModel, list[Batch]], Losses]:
    teacher = copy.deepcopy(first).eval().requires_grad_(False)
    weight = 3.0
    temperature = 2.0

    def losses(student: PreTrainedModel, step: list[Batch]) -> Losses:
        ids = torch.cat([batch.corrupted_ids for batch in step])
        old, new = (model.base_model(input_ids=ids).last_hidden_state for model in (teacher, student))
        p = functional.softmax(old / temperature, dim=-1)
        q = functional.softmax(new / temperature, dim=-1)
        distillation = weight * temperature**2 * (p * (p / q).log()).sum(dim=-1).mean()
        return _token_loss(student, step), distillation

    return losses


def _dark_replay(_: PreTrainedModel) -> Callable[[PreTrainedModel, list[Batch]], Losses]:
    buffer = PlainBuffer()
    return lambda model, step: (_token_loss(model, step), *buffer.step(model, step))


@cache
def kd_reference() -> Reference:
    return trained(_distillation, steps())


@cache
def derpp_reference() -> Reference:
    return trained(_dark_replay, steps())


def assert_losses(found: list[Any], expected: list[list[float]], names: tuple[str, ...], rel: float) -> None:
    for line, losses in zip(found, expected, strict=True):
        assert [line[f"loss/{name}"] for name in names] == pytest.approx(losses, rel=rel, abs=1e-6)


def check_teachers_are_exact_and_methods_equal_plain_torch(stage: int, world_size: int, folder: Path) -> None:
    """In three precisions, with parameters that are divided and with ones that are not, and offloaded."""
    zeros = [{"stage": stage, "stage3_param_persistence_threshold": threshold} for threshold in THRESHOLDS]
    offloaded = {**zeros[1], **(OFFLOAD if stage > 1 else {})}
    settings = [(zeros[0], "bf16"), (zeros[1], "fp32"), (offloaded, "fp16")][: 2 if stage == 0 else 3]
    with_teacher = [parity_configs(folder, world_size, zero, [KD], precision)[0] for zero, precision in settings]
    methods = parity_configs(folder, world_size, zeros[1], [KD, DERPP])
    results = run_ranks(teach_and_train, world_size, with_teacher, methods, steps(), NO_DROPOUT)
    for facts, _ in results:
        for found, (zero, precision) in zip(facts, settings, strict=True):
            size = expected_elements(stage, world_size, zero["stage3_param_persistence_threshold"])
            assert found == TeacherFacts(True, True, True, True, size), precision
    (kd_weights, kd_lines), (derpp_weights, derpp_lines) = results[0][1]
    weights, lines = kd_reference()
    assert relative_difference(kd_weights, weights) <= 1e-5
    # At first the teacher is the student.
    assert lines[0][1] == 0.0 and lines[-1][1] > 0.01
    assert_losses(kd_lines, lines, ("mlm", "distillation"), 1e-4)
    weights, lines = derpp_reference()
    print(f"derpp stage {stage} ranks {world_size}: {relative_difference(derpp_weights, weights):.2e}")
    # Answers are rounded to 16 bits, here from float32 and there from float64.
    assert relative_difference(derpp_weights, weights) <= 1e-4
    assert lines[0][1:] == [0.0, 0.0] and lines[-1][1] > 0.01
    assert_losses(derpp_lines, lines, ("mlm", "der", "replay"), 1e-3)
