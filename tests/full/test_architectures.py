"""Every architecture trained by das: two ranks at every ZeRO stage against one rank, bf16, activation checkpointing."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

from das_ds.models.gates import UnitGates
from das_ds.models.registry import ADAPTERS, adapter_for
from helpers.architectures import config_of, gated_experts, run_each, train_head
from helpers.matrix import record
from helpers.parity import relative_difference
from helpers.run_ranks import run_ranks
from helpers.tiny_models import random_importance, tiny_model, without_dropout

pytestmark = [pytest.mark.multirank, pytest.mark.matrix]

LORA = {"rank": 2, "alpha": 8.0}
# (ranks, stage) -> what is run: its name, kind of job and changes of the config.
RUNS: dict[tuple[int, int], dict[str, tuple[str, dict[str, Any]]]] = {
    (1, 0): {"plain": ("train", {}), "importance": ("importance", {}), "lora": ("train", {"lora": LORA})},
    (2, 0): {"plain": ("train", {})},
    (2, 2): {"plain": ("train", {})},
    (2, 3): {
        "plain": ("train", {}),
        "bf16": ("train", {"precision": "bf16"}),
        "checkpointing": ("train", {"gradient_checkpointing": True}),
        "importance": ("importance", {}),
        "lora": ("train", {"lora": LORA}),
    },
}


@cache
def results(world_size: int, stage: int) -> dict[tuple[str, str], Any]:
    """(architecture, name of the run) -> result; one process group, as ZeRO-3 changes torch for a whole process."""
    folder = Path(mkdtemp())
    runs = RUNS[world_size, stage]
    keys = [(model_type, name) for model_type in ADAPTERS for name in runs]
    jobs = [(runs[name][0], config_of(folder, t, world_size, stage, **runs[name][1])) for t, name in keys]
    return dict(zip(keys, run_ranks(run_each, world_size, jobs, timeout=540.0)[0], strict=True))


def result(world_size: int, stage: int, model_type: str, name: str) -> Any:
    found = results(world_size, stage)[model_type, name]
    assert not isinstance(found, str), found
    return found


def trained(world_size: int, stage: int, model_type: str, name: str = "plain") -> Any:
    """(weights, logged lines)."""
    weights, lines = result(world_size, stage, model_type, name)
    check_that_full_units_rest(model_type, weights)
    return weights, lines


def check_that_full_units_rest(model_type: str, weights: dict[str, torch.Tensor]) -> None:
    """The last unit of each group has importance 1 in the last layer: nothing it owns, alone or not, may move."""
    start = tiny_model(model_type, **without_dropout(model_type))
    layout = adapter_for(model_type).layout(start)
    parameters = dict(start.named_parameters())
    for item in layout.ownerships:
        if item.reader or item.layer < layout.num_layers - 1:
            continue
        mine = (item.units == layout.num_units[item.group] - 1).any(dim=1)
        assert mine.any()
        before, after = (
            tensor.detach().reshape(layout.shapes[item.parameter]).movedim(1 + item.axis, 1).flatten(0, 1).flatten(1)
            for tensor in (parameters[item.parameter], weights[item.parameter])
        )
        assert torch.equal(before[mine], after[mine]), item.parameter
        assert not torch.equal(before, after), item.parameter


@pytest.mark.parametrize("model_type", ADAPTERS)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_train_what_one_rank_trains(stage: int, model_type: str) -> None:
    weights, lines = trained(2, stage, model_type)
    expected, expected_lines = trained(1, 0, model_type)
    objective = adapter_for(model_type).objective
    assert relative_difference(weights, expected) <= 1e-4
    for name in (f"loss/{objective}", "loss/contrast", "grad_norm"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in expected_lines], rel=1e-4)
    record(model_type, f"zero {stage}")
    record(model_type, "objective", objective.upper())


@pytest.mark.parametrize("model_type", ADAPTERS)
def test_bf16_moves_with_fp32(model_type: str) -> None:
    weights, lines = trained(2, 3, model_type, "bf16")
    expected, expected_lines = trained(1, 0, model_type)
    name = f"loss/{adapter_for(model_type).objective}"
    assert [line[name] for line in lines] == pytest.approx([line[name] for line in expected_lines], rel=0.03)
    start = {n: p.detach() for n, p in tiny_model(model_type, **without_dropout(model_type)).named_parameters()}
    found, true = (torch.cat([(w[n] - start[n]).flatten() for n in start]) for w in (weights, expected))
    assert torch.nn.functional.cosine_similarity(found, true, dim=0) > 0.9
    record(model_type, "bf16", "ZeRO 3")


@pytest.mark.parametrize("model_type", ADAPTERS)
def test_activation_checkpointing_changes_nothing(model_type: str) -> None:
    weights, _ = trained(2, 3, model_type, "checkpointing")
    expected, _ = trained(1, 0, model_type)
    assert relative_difference(weights, expected) <= 1e-4
    record(model_type, "checkpointing", "ZeRO 3")


@pytest.mark.parametrize("model_type", ADAPTERS)
def test_low_rank_adapters_train_alone(model_type: str) -> None:
    weights, _ = result(2, 3, model_type, "lora")
    expected, _ = result(1, 0, model_type, "lora")
    assert weights and all("lora" in name for name in weights)
    # B begins at zero.
    assert all(weight.any() for name, weight in weights.items() if "lora_B" in name)
    assert relative_difference(weights, expected) <= 1e-4
    record(model_type, "lora", "ZeRO 3")


@pytest.mark.parametrize("model_type", ADAPTERS)
def test_two_ranks_of_shards_measure_what_one_rank_measures(model_type: str) -> None:
    found, expected = result(2, 3, model_type, "importance"), result(1, 0, model_type, "importance")
    for group, values in expected.items():
        assert (values.amax(dim=1) > 0).all()
        torch.testing.assert_close(found[group], values, rtol=1e-3, atol=1e-5 * values.max().item())
    record(model_type, "importance", "ZeRO 3")


def test_a_head_that_reads_the_embeddings_gathers_them(tmp_path: Path) -> None:
    (expected, _), *_ = run_ranks(train_head, 1, config_of(tmp_path, "deberta-v2", 1, 0))
    for weights, _ in run_ranks(train_head, 2, config_of(tmp_path, "deberta-v2", 2, 3)):
        assert "lm_predictions.lm_head.bias" in weights
        assert relative_difference(weights, expected) <= 1e-4


def test_experts_that_run_gated_are_gathered_and_given_back(tmp_path: Path) -> None:
    """What takes the place of the forward of an expert layer runs inside the module call that ZeRO-3 gathers for."""
    model = tiny_model("mixtral", **without_dropout("mixtral"))
    importance = {group: values[:, None] for group, values in random_importance(model).items()}
    ids = torch.randint(5, 100, (4, 12), generator=torch.Generator().manual_seed(0))
    with UnitGates(model, adapter_for("mixtral")).active(importance, num_rows=4), torch.no_grad():
        expected = model.base_model(input_ids=ids).last_hidden_state
    for before, hidden, after in run_ranks(gated_experts, 2, config_of(tmp_path, "mixtral", 2, 3), importance, ids):
        assert before == after == [0, 0]
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)
