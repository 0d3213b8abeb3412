"""Unit importance: one pass per batch equals a loop over single sequences, on one rank and on two, at every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.importance import FAINT, joined_batches, measured
from helpers.reference import fix_noise, reference_importance
from helpers.run_ranks import run_ranks
from helpers.tiny_models import NO_DROPOUT, tiny_model
from helpers.training import LENGTH, run_config

NUM_BATCHES = 2
ROWS = 4


POWERS = {"abs_grad": 1, "squared_grad": 2}


def brute_force(kind: str, power: int) -> dict[str, torch.Tensor]:
    model = tiny_model(**NO_DROPOUT).double()
    batches = joined_batches(NUM_BATCHES, ROWS)
    inputs = torch.cat([batch.input_ids for batch in batches])
    labels = torch.full_like(inputs, -100)
    for index, batch in enumerate(batches):
        labels[index * ROWS : (index + 1) * ROWS].view(-1)[batch.predicted] = batch.targets
    if kind == "proxy":
        fix_noise(model, 2 * len(inputs), LENGTH)
    corrupted = torch.cat([batch.corrupted_ids for batch in batches])
    return reference_importance(model, inputs, corrupted, labels, kind, power)  # type: ignore[arg-type]


@pytest.mark.multirank
@pytest.mark.parametrize("kind", ["mlm", "proxy"])
@pytest.mark.parametrize(("stage", "world_size"), [(0, 1), (0, 2), (2, 2), (3, 1), (3, 2)])
def test_unit_importance_equals_loop_over_sequences(kind: str, stage: int, world_size: int, tmp_path: Path) -> None:
    train = {"micro_batch_size": ROWS // world_size, "global_batch_size": ROWS, "precision": "fp32"}
    config = run_config(tmp_path, train=train, deepspeed={"zero_optimization": {"stage": stage}})
    found = run_ranks(measured, world_size, config, kind, joined_batches(NUM_BATCHES, ROWS), NO_DROPOUT)
    for summed, power in POWERS.items():
        for group, expected in brute_force(kind, power).items():
            for rank, importance in enumerate(found):
                difference = (importance[summed][group] - expected).abs().max() / expected.abs().max()
                assert difference < 1e-5, (summed, group, rank)


@pytest.mark.multirank
@pytest.mark.parametrize(("precision", "checkpointing"), [("fp32", True), ("bf16", False)])
def test_unit_importance_bf16_and_checkpointing(precision: str, checkpointing: bool, tmp_path: Path) -> None:
    model: dict[str, Any] = {"gradient_checkpointing": checkpointing}
    train = {"micro_batch_size": ROWS // 2, "global_batch_size": ROWS, "precision": precision}
    config = run_config(tmp_path, model=model, train=train, deepspeed={"zero_optimization": {"stage": 3}})
    found = run_ranks(measured, 2, config, "mlm", joined_batches(NUM_BATCHES, ROWS), NO_DROPOUT)[0]
    for summed, power in POWERS.items():
        for group, expected in brute_force("mlm", power).items():
            # bf16 keeps 8 bits of every activation.
            tolerance = 1e-5 if checkpointing else 5e-2 * power
            assert (found[summed][group] - expected).abs().max() / expected.abs().max() < tolerance, (summed, group)


@pytest.mark.multirank
@pytest.mark.parametrize(("kind", "stage", "power"), [("faint", 2, 16), ("mlm", 3, 30)])
def test_unit_importance_fp16_stays_in_range(kind: str, stage: int, power: int, tmp_path: Path) -> None:
    train = {"micro_batch_size": ROWS // 2, "global_batch_size": ROWS, "precision": "fp16"}
    deepspeed = {"zero_optimization": {"stage": stage}, "fp16": {"initial_scale_power": power}}
    config = run_config(tmp_path, train=train, deepspeed=deepspeed)
    found = run_ranks(measured, 2, config, kind, joined_batches(NUM_BATCHES, ROWS), NO_DROPOUT)
    factor = FAINT if kind == "faint" else 1.0
    for summed, power in POWERS.items():
        for group, expected in brute_force("mlm", power).items():
            assert torch.equal(found[0][summed][group], found[1][summed][group])
            # Without a scale the faint gradients, most of them below 6e-8, would be zero.
            difference = (found[0][summed][group] / factor**power - expected).abs().max() / expected.abs().max()
            assert difference < 1e-2 * power, (summed, group)
