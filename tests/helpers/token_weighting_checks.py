"""Methods that weight or replace the losses of tokens, eaft and replay with `loss: kl`, against plain torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from das_ds.config import DomainConfig, RunConfig
from das_ds.data.batch import Batch
from das_ds.data.replay import mark_replayed
from helpers.distillation_checks import Losses, Reference, assert_losses, trained
from helpers.parity import parity_configs, relative_difference, steps
from helpers.run_ranks import run_ranks
from helpers.tiny_models import NO_DROPOUT
from helpers.training import train_all

TOP_K = 7
EXPONENT = 1.5
KL_WEIGHT = 3.0
EAFT = {"name": "eaft", "top_k": TOP_K, "exponent": EXPONENT}
REPLAY = {"fraction": 0.25, "loss": "kl", "kl_weight": KL_WEIGHT}
METHODS = [EAFT, {"name": "ncl", "replay": REPLAY}, {**EAFT, "replay": REPLAY}]
IS_WEIGHTED = (True, False, True)
LOSSES = (("mlm",), ("mlm", "replay_kl"), ("mlm", "replay_kl"))
ROWS = [[], [2], [0, 3], [1, 2, 3], [0], [0, 1, 2, 3]]
"""Replayed rows of the micro-steps, in turns: of two ranks with two rows each both, one or none has some."""


def replaying_steps() -> list[list[Batch]]:
    """The steps of `parity.steps`, with rows that are replayed."""
    batches = [[*step] for step in steps()]
    numbers = iter(range(10**6))
    return [[mark_replayed(batch, ROWS[next(numbers) % len(ROWS)]) for batch in step] for step in batches]


def token_weighting_configs(folder: Path, world_size: int, stage: int, precision: str = "fp32") -> list[RunConfig]:
    """One run per entry of `METHODS`, on the second of two domains."""
    domains = [DomainConfig(name=name, train=["unused.txt"]) for name in ("earlier", "domain")]
    zero = {"stage": stage, "stage3_param_persistence_threshold": 30}
    return [
        config.model_copy(update={"domains": domains})
        for config in parity_configs(folder, world_size, zero, METHODS, precision)
    ]


def _method(number: int) -> Callable[[PreTrainedModel], Callable[[PreTrainedModel, list[Batch]], Losses]]:
    def with_teacher(first: PreTrainedModel) -> Callable[[PreTrainedModel, list[Batch]], Losses]:
        teacher = copy.deepcopy(first).eval().requires_grad_(False)
        return lambda model, step: _losses(model, teacher, step, number)

    return with_teacher


def _losses(model: PreTrainedModel, teacher: PreTrainedModel, step: list[Batch], number: int) -> Losses:
    """Sums over single positions."""
    tokens = torch.zeros((), dtype=torch.float64)
    divergence = torch.zeros((), dtype=torch.float64)
    for batch in step:
        logits = model(input_ids=batch.corrupted_ids).logits.flatten(0, 1)
        answers = teacher(input_ids=batch.corrupted_ids).logits.flatten(0, 1)
        rows = [] if batch.replayed_rows is None or len(LOSSES[number]) == 1 else batch.replayed_rows.tolist()
        for position, target in zip(batch.predicted.tolist(), batch.targets.tolist(), strict=True):
            log_q = logits[position].log_softmax(dim=0)
            if position // batch.input_ids.shape[1] in rows:
                p = functional.softmax(answers[position], dim=0)
                divergence = divergence + (p * (p.log() - log_q)).sum()
            else:
                weight = _entropy(logits[position]) ** EXPONENT if IS_WEIGHTED[number] else 1.0
                tokens = tokens - weight * log_q[target]
    count = sum(batch.num_predicted for batch in step)
    return tuple(loss / count for loss in (tokens, KL_WEIGHT * divergence)[: len(LOSSES[number])])


def _entropy(logits: torch.Tensor) -> float:
    exponentials = sorted((math.exp(value) for value in logits.tolist()), reverse=True)[:TOP_K]
    probabilities = [value / sum(exponentials) for value in exponentials]
    return -sum(p * math.log(p) for p in probabilities) / math.log(TOP_K)


@cache
def token_weighting_reference(number: int) -> Reference:
    """What entry `number` of `METHODS` has to give, in float64."""
    return trained(_method(number), replaying_steps())


def check_token_weighting_equals_plain_torch(stage: int, world_size: int, folder: Path) -> None:
    """Weights and losses of five steps in fp32."""
    configs = token_weighting_configs(folder, world_size, stage)
    results = run_ranks(train_all, world_size, configs, replaying_steps(), NO_DROPOUT)
    for number, (weights, lines) in enumerate(results[0]):
        expected, losses = token_weighting_reference(number)
        difference = relative_difference(weights, expected)
        print(f"{METHODS[number]} stage {stage} ranks {world_size}: {difference:.2e}")
        assert difference <= 1e-5
        assert_losses(lines, losses, LOSSES[number], 1e-4)
        if len(LOSSES[number]) == 2:
            # At first the teacher is the student.
            assert abs(losses[0][1]) < 1e-12 and max(line[1] for line in losses) > 0.01


def check_16_bits_follow_plain_torch(precision: str, stage: int, world_size: int, folder: Path) -> None:
    """Losses of five steps, up to the rounding of weights and activations."""
    configs = token_weighting_configs(folder, world_size, stage, precision)
    results = run_ranks(train_all, world_size, configs, replaying_steps(), NO_DROPOUT)
    for number, (_, lines) in enumerate(results[0]):
        _, losses = token_weighting_reference(number)
        for line, expected in zip(lines, losses, strict=True):
            for name, loss in zip(LOSSES[number], expected, strict=True):
                print(f"{precision} {METHODS[number]} {name}: {line[f'loss/{name}']:.4f} {loss:.4f}")
                assert abs(line[f"loss/{name}"] - loss) <= 0.03 * expected[0]
