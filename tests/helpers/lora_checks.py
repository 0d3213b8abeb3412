"""Adapters trained by the engine against those written out without peft."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from das_ds.config import LoraConfig, RunConfig
from das_ds.models.architectures.registry import spec_for
from das_ds.models.lora import Lora
from das_ds.softmask.importance_file import save_unit_importance
from helpers.lora import adapted, explicit_scales, random_weights, to_dense, to_double
from helpers.parity import ACCUMULATION, EPS, NUM_STEPS, ROWS, SETTINGS, relative_difference, steps
from helpers.reference import reference_train
from helpers.run_ranks import run_ranks
from helpers.tiny_models import NO_DROPOUT, random_importance, tiny_model
from helpers.training import run_config, train_all

LORA = LoraConfig(rank=4, alpha=8.0)


@cache
def reference(setting: int) -> Any:
    """Five steps on A and B of a network without peft, in float64."""
    model = tiny_model(**NO_DROPOUT)
    lora = Lora.plan(model, spec_for("roberta").layout(model), LORA)
    weights = random_weights(lora)
    importance = random_importance(model)
    softmask = {key: value for key, value in SETTINGS[setting].items() if key != "apply_to"}
    return reference_train(
        to_dense(model, lora, weights),
        [[vars(batch) for batch in step] for step in steps()],
        importance,
        learning_rates=[1e-2 * (NUM_STEPS - step) / NUM_STEPS for step in range(NUM_STEPS)],
        apply_to=SETTINGS[setting]["apply_to"],  # type: ignore[arg-type]
        eps=EPS,
        max_grad_norm=0.5,
        scales=to_double(explicit_scales(weights, importance, **softmask)),  # type: ignore[arg-type]
        dtype=torch.float64,
    )


def configs(folder: Path, world_size: int, stage: int, precision: str = "fp32") -> list[RunConfig]:
    """One run per soft mask, from saved adapters whose B is not zero."""
    model = tiny_model()
    spec = spec_for("roberta")
    save_unit_importance(folder / "importance.safetensors", random_importance(model), spec.layout(model))
    adapted(model, spec, LORA, folder / "adapter")
    small = run_config(folder)
    train = {"global_batch_size": ROWS * ACCUMULATION, "micro_batch_size": ROWS // world_size, "eps": EPS}
    return [
        run_config(
            folder,
            model={
                "lora": {**LORA.model_dump(), "init_from": str(folder / "adapter")},
                "gradient_checkpointing": stage == 3,
            },
            train={**small.train.model_dump(), **train, "precision": precision},
            deepspeed={"zero_optimization": {"stage": stage}},
            method={"softmask": softmask, "importance": {"init_from": str(folder / "importance.safetensors")}},
        )
        for softmask in SETTINGS
    ]


def check_adapters_equal_explicit_network(stage: int, world_size: int, folder: Path) -> None:
    results = run_ranks(train_all, world_size, configs(folder, world_size, stage), steps(), NO_DROPOUT)
    for setting, (weights, lines) in enumerate(results[0]):
        expected = reference(setting)
        assert relative_difference(weights, dict(expected.model.named_parameters())) <= 1e-5
        assert [line["loss/mlm"] for line in lines] == pytest.approx(expected.mlm_losses, rel=1e-5)
        assert [line["loss/contrast"] for line in lines] == pytest.approx(expected.contrast_losses, rel=1e-4)
        assert [line["grad_norm"] for line in lines] == pytest.approx(expected.grad_norms, rel=1e-4)


def check_bf16_protected_units_do_not_move(stage: int, folder: Path) -> None:
    (update, *_) = run_ranks(train_all, 2, configs(folder, 2, stage, "bf16")[:1], steps(), NO_DROPOUT)[0]
    weights, lines = update
    assert [line["loss/mlm"] for line in lines] == pytest.approx(reference(0).mlm_losses, rel=0.03)
    model = tiny_model()
    start = random_weights(Lora.plan(model, spec_for("roberta").layout(model), LORA))
    moved = {name: (weights[name] - start[name]).abs() for name in start}
    layer = "roberta.encoder.layer.1"
    # The last head and the last intermediate unit of layer 1 have importance 1.
    assert not moved[f"{layer}.intermediate.dense.lora_B.default.weight"][-1].any()
    assert not moved[f"{layer}.attention.output.dense.lora_A.default.weight"][:, -8:].any()
    assert moved[f"{layer}.intermediate.dense.lora_A.default.weight"].min() > 0
