"""Importance passes of the product on real ranks, for comparison with brute force."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from typing import Any

import torch
from torch import nn

from das_ds.config import ImportanceScore, RunConfig
from das_ds.data.batch import Batch
from das_ds.distributed.process_group import init_process_group
from das_ds.distributed.resumable import ResumableLoop
from das_ds.functional.units import UnitValues
from das_ds.softmask.measure import GENERAL_KNOWLEDGE, PRETRAINING, measure_unit_importance, pretraining_loss
from helpers.reference import FixedNoise, fix_noise
from helpers.training import LENGTH, build, random_batch, rank_part

FAINT = 2.0**-22
"""Factor that makes gradients too small for fp16."""
LOSSES = {
    "mlm": PRETRAINING,
    "proxy": GENERAL_KNOWLEDGE,
    "faint": replace(PRETRAINING, of_sequences=lambda forward, batch: pretraining_loss(forward, batch) * FAINT),
}


def measured(
    config: RunConfig, kind: str, batches: list[Batch], model_changes: dict[str, Any]
) -> dict[str, UnitValues]:
    """Importance of each kind over joined batches, of which this rank runs its part; training is not disturbed."""
    ranks = init_process_group()
    run = build(config, ranks, **model_changes)
    info = ranks.info
    before = {name: weight.clone() for name, weight in run.engine.weights.fp32_weights()}
    if kind == "proxy":
        # As many noise rows as there are sequences in both views of all batches.
        num_sequences = sum(len(batch.input_ids) for batch in batches)
        fix_noise(run.engine.module.model, 2 * num_sequences, LENGTH)  # type: ignore[arg-type]
        NoisePerBatch(run.engine.module, batches, num_sequences, info.rank, info.world_size)
    parts = [rank_part(batch, info.rank, info.world_size) for batch in batches]
    kinds: tuple[ImportanceScore, ...] = ("abs_grad", "squared_grad")
    importance = {summed: measure_unit_importance(run, ResumableLoop(parts), LOSSES[kind], summed) for summed in kinds}
    assert all(parameter.grad is None for parameter in run.engine.module.parameters())
    assert all(torch.equal(before[name], weight) for name, weight in run.engine.weights.fp32_weights())
    assert run.engine.module.training
    run.engine.close()
    return importance


class NoisePerBatch:
    """Gives every sequence the two noise rows that the reference gives it, whatever rank and batch it is in."""

    def __init__(self, module: nn.Module, batches: list[Batch], num_sequences: int, rank: int, world_size: int) -> None:
        self._module = module
        rows: list[list[int]] = []
        first = 0
        for batch in batches:
            size = len(batch.input_ids) // world_size
            mine = list(range(first + rank * size, first + (rank + 1) * size))
            rows.append([*mine, *(num_sequences + row for row in mine)])
            first += len(batch.input_ids)
        # A second pass over the batches starts from the beginning.
        self._rows = cycle(rows)
        module.register_forward_pre_hook(self._next)

    def _next(self, *_: object) -> None:
        rows = next(self._rows)
        for module in self._module.modules():
            if isinstance(module, FixedNoise):
                module.rows = rows


def joined_batches(num_batches: int, rows: int) -> list[Batch]:
    """Batches as all ranks together see them."""
    return [random_batch(rows, 100 + index) for index in range(num_batches)]
