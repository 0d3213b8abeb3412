"""The engine at every ZeRO stage and number of ranks against the independent single-process reference."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from das_ds.config import RunConfig
from das_ds.methods.importance_file import save_importance
from das_ds.models.registry import adapter_for
from helpers.reference import reference_train
from helpers.run_ranks import run_ranks
from helpers.tiny_models import NO_DROPOUT, random_importance, tiny_model
from helpers.training import random_batch, run_config, train_all

NUM_STEPS, ROWS = 5, 4
ACCUMULATION = 2
# The gradient of key biases is zero but for rounding (softmax ignores a constant added to all keys); a smaller eps
# would let Adam blow that rounding up to whole steps.
EPS = 1e-4
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SETTINGS = (
    {"apply_to": "update"},
    {"apply_to": "gradient"},
    {"apply_to": "update", "readers": True, "shared_scale": 0.5},
)


def relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference of any weight, relative to the largest weight of its tensor."""
    assert found.keys() == expected.keys()
    return max(((found[n] - expected[n]).abs().max() / expected[n].abs().max()).item() for n in expected)


def configs(folder: Path, world_size: int, zero: dict[str, Any], precision: str = "fp32") -> list[RunConfig]:
    train = {
        "micro_batch_size": ROWS // world_size,
        "global_batch_size": ROWS * ACCUMULATION,
        "precision": precision,
        "eps": EPS,
    }
    return [
        run_config(
            folder,
            train={**run_config(folder).train.model_dump(), **train},
            deepspeed={"zero_optimization": zero},
            method={"softmask": softmask, "importance": {"initial": str(folder / "importance.safetensors")}},
        )
        for softmask in SETTINGS
    ]


@pytest.fixture
def importance_file(tmp_path: Path) -> Path:
    model = tiny_model()
    path = tmp_path / "importance.safetensors"
    save_importance(path, random_importance(model), adapter_for("roberta").layout(model))
    return path


def steps() -> list[list[Any]]:
    return [[random_batch(ROWS, 10 * step + m) for m in range(ACCUMULATION)] for step in range(NUM_STEPS)]


def reference(softmask: dict[str, Any]) -> Any:
    model = tiny_model(**NO_DROPOUT)
    return reference_train(
        model,
        [[vars(batch) for batch in step] for step in steps()],
        random_importance(model),
        learning_rates=[1e-2 * (NUM_STEPS - step) / NUM_STEPS for step in range(NUM_STEPS)],
        eps=EPS,
        grad_clip=0.5,
        dtype=torch.float64,
        **softmask,
    )


@pytest.mark.multirank
@pytest.mark.parametrize(("stage", "world_size"), list(product(range(4), (1, 2))))
def test_weights_after_five_steps_equal_the_reference(stage: int, world_size: int, importance_file: Path) -> None:
    settings = configs(importance_file.parent, world_size, {"stage": stage})
    results = run_ranks(train_all, world_size, settings, steps(), NO_DROPOUT)
    for softmask, (weights, lines) in zip(SETTINGS, results[0], strict=True):
        expected = reference(softmask)
        difference = relative_difference(weights, dict(expected.model.named_parameters()))
        print(f"parity stage {stage} ranks {world_size} {softmask}: {difference:.2e}")
        assert difference <= 1e-5
        assert [line["loss/mlm"] for line in lines] == pytest.approx(expected.mlm_losses, rel=1e-5)
        assert [line["loss/contrast"] for line in lines] == pytest.approx(expected.contrast_losses, rel=1e-4)
        assert [line["grad_norm"] for line in lines] == pytest.approx(expected.grad_norms, rel=1e-4)


@pytest.mark.multirank
@pytest.mark.parametrize("stage", [2, 3])
def test_offload_equals_the_reference(stage: int, importance_file: Path) -> None:
    settings = configs(importance_file.parent, 2, {"stage": stage, **OFFLOAD})
    results = run_ranks(train_all, 2, settings, steps(), NO_DROPOUT)
    for softmask, (weights, _) in zip(SETTINGS, results[0], strict=True):
        assert relative_difference(weights, dict(reference(softmask).model.named_parameters())) <= 1e-5


@pytest.mark.multirank
@pytest.mark.parametrize(("stage", "world_size"), [(0, 2), (1, 2), (2, 2), (3, 1), (3, 2)])
def test_bf16_moves_with_the_reference_and_keeps_full_units_still(
    stage: int, world_size: int, importance_file: Path
) -> None:
    settings = configs(importance_file.parent, world_size, {"stage": stage}, precision="bf16")
    results = run_ranks(train_all, world_size, settings, steps(), NO_DROPOUT)
    start = {name: weight.detach().bfloat16().float() for name, weight in tiny_model().named_parameters()}
    layer = "roberta.encoder.layer.1"
    for softmask, (weights, lines) in zip(SETTINGS, results[0], strict=True):
        expected = reference(softmask)
        assert [line["loss/mlm"] for line in lines] == pytest.approx(expected.mlm_losses, rel=0.03)
        assert all(weight.dtype == torch.float32 for weight in weights.values())
        # The last intermediate unit of layer 1 has importance 1 and must not move at all, not even by weight decay ...
        moved = weights[f"{layer}.intermediate.dense.weight"] - start[f"{layer}.intermediate.dense.weight"]
        if softmask["apply_to"] == "update":
            assert torch.equal(moved[-1], torch.zeros_like(moved[-1]))
        # ... and all others move as in float64, but for what 8 bits of gradient lose.
        found = torch.cat([(weights[n] - start[n]).flatten() for n in weights if "key.bias" not in n])
        true = torch.cat(
            [(w - start[n]).flatten() for n, w in expected.model.named_parameters() if "key.bias" not in n]
        )
        assert torch.nn.functional.cosine_similarity(found, true.float(), dim=0) > 0.97


@pytest.mark.multirank
def test_activation_checkpointing_changes_nothing(importance_file: Path) -> None:
    settings = configs(importance_file.parent, 2, {"stage": 3})
    checkpointed = [
        config.model_copy(update={"model": config.model.model_copy(update={"gradient_checkpointing": True})})
        for config in settings
    ]
    results = run_ranks(train_all, 2, checkpointed, steps(), NO_DROPOUT)
    for softmask, (weights, _) in zip(SETTINGS, results[0], strict=True):
        assert relative_difference(weights, dict(reference(softmask).model.named_parameters())) <= 1e-5
