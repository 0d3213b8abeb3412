"""LoRA inside the engine: at every ZeRO stage as written out without peft, and in whole runs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from das_ds.config import LoraConfig, RunConfig
from das_ds.methods import METHODS
from das_ds.methods.importance_file import save_unit_importance
from das_ds.models.lora import Lora
from das_ds.models.registry import adapter_for
from helpers.lora import adapted, random_weights, to_double, written_out, written_out_scales
from helpers.parity import ACCUMULATION, EPS, NUM_STEPS, ROWS, SETTINGS, relative_difference, steps
from helpers.reference import reference_train
from helpers.run_ranks import run_ranks
from helpers.runs import evaluate_export, exported_weights, metrics_lines, run_all, run_stopped_and_continued, small_run
from helpers.tiny_models import NO_DROPOUT, random_importance, tiny_model
from helpers.training import run_config, train_all

pytestmark = pytest.mark.multirank

LORA = LoraConfig(rank=4, alpha=8.0)
LINEAR_WEIGHTS = ("query.weight", "key.weight", "value.weight", "dense.weight")


@cache
def reference(setting: int) -> Any:
    """Five steps on A and B of a network without peft, in float64."""
    model = tiny_model(**NO_DROPOUT)
    lora = Lora.plan(model, adapter_for("roberta").layout(model), LORA)
    weights, importance = random_weights(lora), random_importance(model)
    softmask = {key: value for key, value in SETTINGS[setting].items() if key != "apply_to"}
    return reference_train(
        written_out(model, lora, weights),
        [[vars(batch) for batch in step] for step in steps()],
        importance,
        learning_rates=[1e-2 * (NUM_STEPS - step) / NUM_STEPS for step in range(NUM_STEPS)],
        apply_to=SETTINGS[setting]["apply_to"],  # type: ignore[arg-type]
        eps=EPS,
        grad_clip=0.5,
        scales=to_double(written_out_scales(weights, importance, **softmask)),  # type: ignore[arg-type]
        dtype=torch.float64,
    )


def configs(folder: Path, world_size: int, stage: int, precision: str = "fp32") -> list[RunConfig]:
    """One run per soft mask, from saved adapters whose B is not zero."""
    model, adapter = tiny_model(), adapter_for("roberta")
    save_unit_importance(folder / "importance.safetensors", random_importance(model), adapter.layout(model))
    adapted(model, adapter, LORA, folder / "adapter")
    small = run_config(folder)
    train = {"global_batch_size": ROWS * ACCUMULATION, "micro_batch_size": ROWS // world_size, "eps": EPS}
    return [
        run_config(
            folder,
            model={
                "lora": {**LORA.model_dump(), "initial": str(folder / "adapter")},
                "gradient_checkpointing": stage == 3,
            },
            train={**small.train.model_dump(), **train, "precision": precision},
            deepspeed={"zero_optimization": {"stage": stage}},
            method={"softmask": softmask, "importance": {"initial": str(folder / "importance.safetensors")}},
        )
        for softmask in SETTINGS
    ]


@pytest.mark.parametrize(("stage", "world_size"), [(0, 2), (2, 1), (2, 2), (3, 2)])
def test_adapters_after_five_steps_equal_the_written_out_network(stage: int, world_size: int, tmp_path: Path) -> None:
    results = run_ranks(train_all, world_size, configs(tmp_path, world_size, stage), steps(), NO_DROPOUT)
    for setting, (weights, lines) in enumerate(results[0]):
        expected = reference(setting)
        assert relative_difference(weights, dict(expected.model.named_parameters())) <= 1e-5
        assert [line["loss/mlm"] for line in lines] == pytest.approx(expected.mlm_losses, rel=1e-5)
        assert [line["loss/contrast"] for line in lines] == pytest.approx(expected.contrast_losses, rel=1e-4)
        assert [line["grad_norm"] for line in lines] == pytest.approx(expected.grad_norms, rel=1e-4)


@pytest.mark.parametrize("stage", [0, 3])
def test_bf16_keeps_what_full_units_own_still(stage: int, tmp_path: Path) -> None:
    (update, *_) = run_ranks(train_all, 2, configs(tmp_path, 2, stage, "bf16")[:1], steps(), NO_DROPOUT)[0]
    weights, lines = update
    assert [line["loss/mlm"] for line in lines] == pytest.approx(reference(0).mlm_losses, rel=0.03)
    model = tiny_model()
    start = random_weights(Lora.plan(model, adapter_for("roberta").layout(model), LORA))
    moved = {name: (weights[name] - start[name]).abs() for name in start}
    layer = "roberta.encoder.layer.1"
    # The last head and the last intermediate unit of layer 1 have importance 1.
    assert not moved[f"{layer}.intermediate.dense.lora_B.default.weight"][-1].any()
    assert not moved[f"{layer}.attention.output.dense.lora_A.default.weight"][:, -8:].any()
    assert moved[f"{layer}.intermediate.dense.lora_A.default.weight"].min() > 0


def lora_run(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    values = small_run(folder, output_dir=folder / name, **changes)
    values["model"] = {**values["model"], "lora": {"rank": 4, "dropout": 0.1}}
    values["train"] = {**values["train"], "micro_batch_size": 2, "learning_rate": 1e-2}
    return values


def test_every_method_exports_merged_weights_and_adapters(tmp_path: Path) -> None:
    levels = {"das": {"name": "das"}, "spg": {"name": "das", "importance": {"granularity": "parameter"}}}
    # A pool has one stage, and so no two models that could differ.
    methods = {**{name: {"name": name} for name in METHODS if name != "pool"}, **levels}
    runs = {name: lora_run(tmp_path, name, method=method) for name, method in methods.items()}
    # Units without an adapter own nothing that is trained; their importance must not become 0 / 0.
    runs["spg"]["model"]["lora"]["target_modules"] = ["query", "value"]
    results = run_ranks(run_all, 2, list(runs.values()))[0]
    for name, result in zip(runs, results, strict=True):
        first, last = (exported_weights(tmp_path / name, domain) for domain in ("00_food", "01_papers"))
        changed = {key for key in first if not torch.equal(first[key], last[key])}
        ends = ("query.weight", "value.weight") if name == "spg" else LINEAR_WEIGHTS
        assert changed == {key for key in first if ".layer." in key and key.endswith(ends)}
        assert result.loss_matrix[1][0] < result.loss_matrix[0][0]
        found = run_ranks(evaluate_export, 1, runs[name], tmp_path / name / "domains" / "01_papers" / "model")[0]
        assert list(found.values()) == pytest.approx(result.loss_matrix[2], rel=1e-5)


def test_run_continued_from_its_adapters_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    changes = {"method": {"name": "ncl"}, "deepspeed": {"zero_optimization": {"stage": 3}}}
    whole, parts = (lora_run(tmp_path, name, train={"precision": "bf16"}, **changes) for name in ("whole", "parts"))
    expected = run_ranks(run_all, 2, [whole])[0][0]
    found = run_ranks(run_stopped_and_continued, 2, parts)[0]
    assert found.loss_matrix == expected.loss_matrix
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        mine, theirs = (load_file(tmp_path / run / "domains" / "01_papers" / name) for run in ("whole", "parts"))
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    mine, theirs = metrics_lines(tmp_path / "whole"), metrics_lines(tmp_path / "parts")
    assert [line["loss"] for line in mine] == [line["loss"] for line in theirs]
