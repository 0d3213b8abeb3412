"""Reference values for 16 bits and for a long run."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from das_ds.models.architectures.registry import spec_for
from das_ds.softmask.importance_file import save_parameter_importance, save_unit_importance
from helpers.parity import (
    EPS,
    ROWS,
    SETTINGS,
    configs,
    reference,
    relative_difference,
    steps,
)
from helpers.run_ranks import run_ranks
from helpers.tiny_models import NO_DROPOUT, random_importance, tiny_model
from helpers.training import random_batch, run_config, train_all

LONG_RUN = 100
LONG_RATE = 1e-3


@cache
def plain_adamw() -> dict[str, torch.Tensor]:
    """Weights after `LONG_RUN` steps of torch's own AdamW in float64, on one process and without any mask."""
    model = tiny_model(**NO_DROPOUT).double()
    parameters = dict(model.named_parameters())
    matrices, vectors = ([p for p in parameters.values() if (p.dim() > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LONG_RATE, eps=EPS)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, LONG_RUN)
    for number in range(LONG_RUN):
        batch = random_batch(ROWS, number)
        logits = model(input_ids=batch.corrupted_ids).logits.flatten(0, 1)[batch.predicted]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, batch.targets).backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 0.5)
        optimizer.step()
        scheduler.step()
    return {name: value.detach() for name, value in parameters.items()}


def check_importance_zero_is_torchs_adamw_over_100_steps(stage: int, folder: Path) -> None:
    nothing = {group: torch.zeros_like(values) for group, values in random_importance(tiny_model()).items()}
    save_unit_importance(folder / "units.safetensors", nothing, spec_for("roberta").layout(tiny_model()))
    weights = {n: torch.zeros(p.numel(), dtype=torch.uint8) for n, p in tiny_model().named_parameters()}
    save_parameter_importance(folder / "weights.safetensors", weights, spec_for("roberta").layout(tiny_model()))
    runs = [
        run_config(
            folder,
            train={
                **run_config(folder).train.model_dump(),
                "global_batch_size": ROWS,
                "micro_batch_size": ROWS // 2,
                "steps_per_domain": LONG_RUN,
                "learning_rate": LONG_RATE,
                "warmup_ratio": 0.0,
                "eps": EPS,
            },
            deepspeed={"zero_optimization": {"stage": stage}},
            method={
                "contrastive": {"weight": 0.0},
                "importance": {"granularity": granularity, "init_from": str(folder / file)},
            },
        )
        for granularity, file in (("unit", "units.safetensors"), ("parameter", "weights.safetensors"))
    ]
    batches = [[random_batch(ROWS, number)] for number in range(LONG_RUN)]
    for found, _ in run_ranks(train_all, 2, runs, batches, NO_DROPOUT)[0]:
        difference = relative_difference(found, plain_adamw())
        print(f"stage {stage}, {LONG_RUN} steps: {difference:.2e}")
        assert difference <= 1e-5


def check_16_bits_move_with_the_reference_and_keep_full_units_still(
    precision: str, stage: int, world_size: int, folder: Path
) -> None:
    settings = configs(folder, world_size, {"stage": stage}, precision=precision)
    rel, least_similarity = {"bf16": (0.03, 0.97), "fp16": (0.005, 0.999)}[precision]
    results = run_ranks(train_all, world_size, settings, steps(), NO_DROPOUT)
    start = {name: weight.detach() for name, weight in tiny_model().named_parameters()}
    layer = "roberta.encoder.layer.1"
    for setting, (weights, lines) in enumerate(results[0]):
        expected = reference(setting)
        assert [line["loss/mlm"] for line in lines] == pytest.approx(expected.mlm_losses, rel=rel)
        assert all(weight.dtype == torch.float32 for weight in weights.values())
        # The last intermediate unit of layer 1 has importance 1 and must not move at all, not even by weight decay ...
        moved = weights[f"{layer}.intermediate.dense.weight"] - start[f"{layer}.intermediate.dense.weight"]
        if SETTINGS[setting]["apply_to"] == "update":
            assert torch.equal(moved[-1], torch.zeros_like(moved[-1]))
        # ... and all others move as in float64, but for what 8 or 11 bits of gradient lose.
        found = torch.cat([(weights[n] - start[n]).flatten() for n in weights if "key.bias" not in n])
        true = torch.cat(
            [(w - start[n]).flatten() for n, w in expected.model.named_parameters() if "key.bias" not in n]
        )
        similarity = torch.nn.functional.cosine_similarity(found, true.float(), dim=0)
        print(f"{precision} stage {stage} {SETTINGS[setting]}: cosine {similarity:.4f}, {lines[-1]['skipped_steps']}")
        assert similarity > least_similarity
