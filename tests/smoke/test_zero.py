"""Shards, snapshots and waiting, on real ranks."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch

from das_ds.distributed.process_group import LONG_TIMEOUT
from helpers.run_ranks import run_ranks
from helpers.tiny_models import NO_DROPOUT, tiny_model
from helpers.training import random_batch, run_config
from helpers.zero_shards import fail_on_one, identity, matmul_precision, prepare_in_turn, shards_and_restore, timeouts

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize("stage", range(4))
def test_shards_cover_parameters_and_snapshot_restores(stage: int, tmp_path: Path) -> None:
    train = {"micro_batch_size": 2, "global_batch_size": 8, "learning_rate": 0.1}
    configs = [
        run_config(
            tmp_path,
            train={**train, "precision": precision},
            deepspeed={"zero_optimization": {"stage": stage, **extra}},
        )
        # A small sub-group makes ZeRO-3 cut its flat tensors; a persistence threshold of 0 partitions every vector.
        for precision, extra in (
            ("fp32", {}),
            ("bf16", {"sub_group_size": 999, "stage3_param_persistence_threshold": 0}),
        )
    ]
    results = run_ranks(shards_and_restore, 2, configs, random_batch(4, 0))
    expected = {name: weight.detach() for name, weight in tiny_model(**NO_DROPOUT).named_parameters()}
    for index, config in enumerate(configs):
        covered = {name: torch.zeros(weight.numel()) for name, weight in expected.items()}
        for rank in range(2):
            found = results[rank][index]
            assert found["moved"] and found["restored"], (config.train.precision, rank)
            for name, weight in found["weights"].items():
                assert torch.equal(weight, expected[name]), name
            for name, offset, values in found["shards"]:
                assert torch.equal(
                    values.view(-1), found["weights"][name].view(-1)[offset : offset + len(values.view(-1))]
                )
                covered[name][offset : offset + values.numel()] += 1
        times = 2 if stage == 0 else 1
        assert all(torch.equal(count, torch.full_like(count, times)) for count in covered.values())


def test_main_process_first_slow_preparation_no_timeout(tmp_path: Path) -> None:
    results = run_ranks(prepare_in_turn, 2, tmp_path)
    assert [found for found, _ in results] == [1, 1]
    assert all(seconds >= 4 for _, seconds in results)


@pytest.mark.parametrize("stage", range(4))
def test_process_groups_have_collective_timeout(stage: int, tmp_path: Path) -> None:
    config = run_config(tmp_path, deepspeed={"zero_optimization": {"stage": stage}})
    for found in run_ranks(timeouts, 2, config, timedelta(seconds=777), timedelta(seconds=999)):
        long = [timeout for timeout in found if timeout == LONG_TIMEOUT]
        others = [timeout for timeout in found if timeout != LONG_TIMEOUT]
        # torch's and DeepSpeed's, at the least.
        assert len(long) == 2 and len(others) >= 2
        assert set(others) == {timedelta(seconds=999)}


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_engine_sets_matmul_precision(precision: str, tmp_path: Path) -> None:
    assert run_ranks(matmul_precision, 1, run_config(tmp_path, train={"matmul_precision": precision})) == [precision]


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_main_process_first_error_raises_on_all_ranks(failing_rank: int) -> None:
    assert run_ranks(fail_on_one, 2, failing_rank) == [f"found nothing on rank {failing_rank}"] * 2


def test_run_ranks_numbers_ranks() -> None:
    assert run_ranks(identity, 3, 10) == [10, 11, 12]
