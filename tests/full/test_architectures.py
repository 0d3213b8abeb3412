"""Every architecture trained by das: two ranks at every ZeRO stage against one rank, bf16, activation checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from das_ds.models.architectures.registry import ARCHITECTURES, spec_for
from das_ds.models.gates import UnitGates
from helpers.architectures import (
    IMPORTANCE,
    PLAIN,
    Results,
    architecture_config,
    check_same_importance,
    check_same_training,
    check_that_full_units_rest,
    gated_experts,
    get_result,
    run_architectures,
    train_head,
)
from helpers.matrix import record
from helpers.parity import relative_difference
from helpers.run_ranks import run_ranks
from helpers.tiny_models import random_importance, tiny_model, without_dropout

pytestmark = [pytest.mark.multirank, pytest.mark.matrix]

LORA: tuple[str, dict[str, Any]] = ("train", {"lora": {"rank": 2, "alpha": 8.0}})
BF16: tuple[str, dict[str, Any]] = ("train", {"precision": "bf16"})
CHECKPOINTING: tuple[str, dict[str, Any]] = ("train", {"gradient_checkpointing": True})


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All architectures on one rank at stage 0."""
    runs = {"plain": PLAIN, "importance": IMPORTANCE, "lora": LORA}
    return run_architectures(tmp_path_factory.mktemp("one_rank"), 1, 0, ARCHITECTURES, runs)


@pytest.fixture(scope="module")
def stage_0(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All architectures on two ranks."""
    return run_architectures(tmp_path_factory.mktemp("stage_0"), 2, 0, ARCHITECTURES, {"plain": PLAIN})


@pytest.fixture(scope="module")
def stage_2(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All architectures on two ranks."""
    return run_architectures(tmp_path_factory.mktemp("stage_2"), 2, 2, ARCHITECTURES, {"plain": PLAIN})


@pytest.fixture(scope="module")
def stage_3(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All architectures on two ranks, in every form."""
    runs = {"plain": PLAIN, "bf16": BF16, "checkpointing": CHECKPOINTING, "importance": IMPORTANCE, "lora": LORA}
    return run_architectures(tmp_path_factory.mktemp("stage_3"), 2, 3, ARCHITECTURES, runs)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_architecture_two_ranks_training_equals_one_rank(
    stage: int, model_type: str, one_rank: Results, request: pytest.FixtureRequest
) -> None:
    check_same_training(request.getfixturevalue(f"stage_{stage}"), one_rank, model_type)
    record(model_type, f"zero {stage}")
    record(model_type, "objective", spec_for(model_type).objective.upper())


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_architecture_bf16_updates_follow_fp32(model_type: str, stage_3: Results, one_rank: Results) -> None:
    weights, lines = get_result(stage_3, model_type, "bf16")
    expected, expected_lines = get_result(one_rank, model_type)
    check_that_full_units_rest(model_type, weights)
    name = f"loss/{spec_for(model_type).objective}"
    assert [line[name] for line in lines] == pytest.approx([line[name] for line in expected_lines], rel=0.03)
    start = {n: p.detach() for n, p in tiny_model(model_type, **without_dropout(model_type)).named_parameters()}
    found, true = (torch.cat([(w[n] - start[n]).flatten() for n in start]) for w in (weights, expected))
    assert torch.nn.functional.cosine_similarity(found, true, dim=0) > 0.9
    record(model_type, "bf16", "ZeRO 3")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_architecture_activation_checkpointing_same_weights(
    model_type: str, stage_3: Results, one_rank: Results
) -> None:
    weights, _ = get_result(stage_3, model_type, "checkpointing")
    check_that_full_units_rest(model_type, weights)
    assert relative_difference(weights, get_result(one_rank, model_type)[0]) <= 1e-4
    record(model_type, "checkpointing", "ZeRO 3")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_architecture_lora_two_ranks_equal_one_rank(model_type: str, stage_3: Results, one_rank: Results) -> None:
    weights, _ = get_result(stage_3, model_type, "lora")
    assert weights and all("lora" in name for name in weights)
    # B begins at zero.
    assert all(weight.any() for name, weight in weights.items() if "lora_B" in name)
    assert relative_difference(weights, get_result(one_rank, model_type, "lora")[0]) <= 1e-4
    record(model_type, "lora", "ZeRO 3")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_architecture_zero3_importance_equals_one_rank(model_type: str, stage_3: Results, one_rank: Results) -> None:
    check_same_importance(stage_3, one_rank, model_type)
    record(model_type, "importance", "ZeRO 3")


def test_embedding_head_zero3_gathers_embeddings(tmp_path: Path) -> None:
    (expected, _), *_ = run_ranks(train_head, 1, architecture_config(tmp_path, "deberta-v2", 1, 0))
    for weights, _ in run_ranks(train_head, 2, architecture_config(tmp_path, "deberta-v2", 2, 3)):
        assert "lm_predictions.lm_head.bias" in weights
        assert relative_difference(weights, expected) <= 1e-4


def test_gated_experts_zero3_are_gathered_and_released(tmp_path: Path) -> None:
    """What takes the place of the forward of an expert layer runs inside the module call that ZeRO-3 gathers for."""
    model = tiny_model("mixtral", **without_dropout("mixtral"))
    importance = {group: values[:, None] for group, values in random_importance(model).items()}
    ids = torch.randint(5, 100, (4, 12), generator=torch.Generator().manual_seed(0))
    with UnitGates(model, spec_for("mixtral")).active(importance, num_rows=4), torch.no_grad():
        expected = model.base_model(input_ids=ids).last_hidden_state
    for before, hidden, after in run_ranks(
        gated_experts, 2, architecture_config(tmp_path, "mixtral", 2, 3), importance, ids
    ):
        assert before == after == [0, 0]
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)
