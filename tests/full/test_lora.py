"""LoRA in the engine at every ZeRO stage, compared with the network written without peft, and in complete runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from das_ds.config import RunConfig
from das_ds.config.deepspeed import build_engine_config
from das_ds.errors import ConfigError
from das_ds.methods import METHODS, method_class
from helpers.lora_checks import (
    check_adapters_equal_explicit_network,
    check_bf16_protected_units_do_not_move,
)
from helpers.run_ranks import run_ranks
from helpers.runs import (
    evaluate_export,
    exported_weights,
    metrics_lines,
    run_all,
    run_stopped_and_continued,
    run_whose_source_vanishes,
    small_run,
)
from helpers.tiny_models import NO_DROPOUT, tiny_model

pytestmark = pytest.mark.multirank

LINEAR_WEIGHTS = ("query.weight", "key.weight", "value.weight", "dense.weight")


@pytest.mark.parametrize(("stage", "world_size"), [(0, 2), (2, 1), (2, 2)])
def test_lora_all_stages_equal_explicit_network(stage: int, world_size: int, tmp_path: Path) -> None:
    check_adapters_equal_explicit_network(stage, world_size, tmp_path)


def test_lora_zero0_bf16_protected_units_do_not_move(tmp_path: Path) -> None:
    check_bf16_protected_units_do_not_move(0, tmp_path)


def lora_run(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    values = small_run(folder, output_dir=folder / name, **changes)
    values["model"] = {**values["model"], "lora": {"rank": 4, "dropout": 0.1}}
    values["train"] = {**values["train"], "micro_batch_size": 2, "learning_rate": 1e-2}
    return values


def has_two_models_with_lora(values: dict[str, Any]) -> bool:
    """Whether a method takes adapters, and learns domains one by one, so that two models could differ."""
    config = RunConfig(**values)
    try:
        method_class(config.method).validate(config, build_engine_config(config, 2))
    except ConfigError as error:
        assert "lora" in str(error)
        return False
    return not config.method.trains_jointly


def test_lora_every_method_exports_merged_weights_and_adapters(tmp_path: Path) -> None:
    methods: dict[str, Any] = {name: {"name": name} for name in METHODS}
    # To a network with random weights every token is a surprise, and none would be trained on.
    methods["stm"]["max_perplexity"] = 1e4
    methods["spg"] = {"name": "das", "importance": {"granularity": "parameter"}}
    runs = {name: lora_run(tmp_path, name, method=method) for name, method in methods.items()}
    runs = {name: values for name, values in runs.items() if has_two_models_with_lora(values)}
    assert {"das", "spg", "directions", "ewc", "ncl"} <= runs.keys()
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


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
def test_lora_export_without_source_equals_run(stage: int, precision: str, tmp_path: Path) -> None:
    source = tmp_path / "base"
    base = tiny_model(vocab_size=300, **NO_DROPOUT)
    base.save_pretrained(source)
    engine = {"zero_optimization": {"stage": stage}}
    values = lora_run(tmp_path, "run", method={"name": "ncl"}, deepspeed=engine, train={"precision": precision})
    values["model"] = {"name_or_path": str(source), "lora": {"rank": 4, "target_modules": ["query"]}}
    result = run_ranks(run_whose_source_vanishes, 2, values, source, 2)[0]
    assert not source.exists()
    model = tmp_path / "run" / "domains" / "01_papers" / "model"
    found = run_ranks(evaluate_export, 2, values, model)[0]
    assert list(found.values()) == pytest.approx(result.loss_matrix[2], rel=1e-5 if precision == "fp32" else 0.02)
    # What is not adapted keeps every bit, though the engine ran on rounded weights.
    weights = exported_weights(tmp_path / "run", "01_papers")
    for name, weight in base.named_parameters():
        assert torch.equal(weights[name], weight) != name.endswith("query.weight"), name
    assert AutoModelForMaskedLM.from_pretrained(model).dtype == torch.float32


def test_lora_init_from_adapter_equals_uninterrupted_run(tmp_path: Path) -> None:
    changes = {"method": {"name": "ncl"}, "deepspeed": {"zero_optimization": {"stage": 3}}}
    complete, parts = (
        lora_run(tmp_path, name, train={"precision": "bf16"}, **changes) for name in ("complete", "parts")
    )
    expected = run_ranks(run_all, 2, [complete])[0][0]
    found = run_ranks(run_stopped_and_continued, 2, parts)[0]
    assert found.loss_matrix == expected.loss_matrix
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        mine, theirs = (load_file(tmp_path / run / "domains" / "01_papers" / name) for run in ("complete", "parts"))
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    mine = metrics_lines(tmp_path / "complete")
    theirs = metrics_lines(tmp_path / "parts")
    assert [line["loss"] for line in mine] == [line["loss"] for line in theirs]
