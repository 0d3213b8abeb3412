"""Gradient norms by group of a step on several ranks, and by plain autograd on the complete batch."""

from __future__ import annotations

import math

from torch.nn.functional import cross_entropy

from das_ds.config import RunConfig
from das_ds.data.batch import Batch
from das_ds.distributed.process_group import init_process_group
from das_ds.models.architectures.registry import spec_for
from das_ds.training.gradient_groups import gradient_groups
from helpers.tiny_models import NO_DROPOUT, tiny_model
from helpers.training import build, rank_part


def step_group_norms(config: RunConfig, batch: Batch) -> tuple[dict[str, float], float]:
    """(group -> norm, complete norm) of one step of two micro-batches."""
    ranks = init_process_group()
    run = build(config, ranks, **NO_DROPOUT)
    engine = run.engine
    engine.measure_groups(gradient_groups(run.layout))
    engine.start_domain(3)
    part = rank_part(batch, ranks.info.rank, ranks.info.world_size)
    norm = None
    for micro_batch in (rank_part(part, 0, 2), rank_part(part, 1, 2)):
        _, losses = engine(micro_batch.corrupted_ids, micro_batch.predicted, micro_batch.targets)
        engine.backward(losses.sum())
        norm = engine.step(measure_norm=True)
    measured = engine.group_norms
    engine.close()
    assert norm is not None
    return measured, float(norm)


def expected_group_norms(batch: Batch, num_parts: int) -> dict[str, float]:
    """The same by plain autograd in float64: of the sum of losses over the number of parts that are averaged."""
    model = tiny_model("roberta", **NO_DROPOUT).double()
    logits = model(input_ids=batch.corrupted_ids).logits.flatten(0, 1)[batch.predicted]
    (cross_entropy(logits, batch.targets, reduction="sum") / num_parts).backward()
    groups = gradient_groups(spec_for("roberta").layout(model))
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            squares[groups[name]] = squares.get(groups[name], 0.0) + float(parameter.grad.square().sum())
    return {group: math.sqrt(square) for group, square in squares.items()}
