"""Six different architectures on two ranks at ZeRO 3, compared with one rank."""

from __future__ import annotations

import pytest

from helpers.architectures import (
    IMPORTANCE,
    PLAIN,
    Results,
    check_same_importance,
    check_same_training,
    run_architectures,
)

pytestmark = pytest.mark.multirank

ARCHITECTURES = ("bert", "deberta-v2", "modernbert", "gpt2", "llama", "mixtral")
RUNS = {"plain": PLAIN, "importance": IMPORTANCE}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """At stage 0."""
    return run_architectures(tmp_path_factory.mktemp("one_rank"), 1, 0, ARCHITECTURES, RUNS)


@pytest.fixture(scope="module")
def stage_3(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """On two ranks."""
    return run_architectures(tmp_path_factory.mktemp("stage_3"), 2, 3, ARCHITECTURES, RUNS)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_architecture_zero3_training_equals_one_rank(model_type: str, stage_3: Results, one_rank: Results) -> None:
    check_same_training(stage_3, one_rank, model_type)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_architecture_zero3_importance_equals_one_rank(model_type: str, stage_3: Results, one_rank: Results) -> None:
    check_same_importance(stage_3, one_rank, model_type)
