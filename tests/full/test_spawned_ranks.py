"""Spawned ranks, as on a machine with a GPU, instead of forked ones."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from helpers.run_ranks import run_ranks
from helpers.runs import run_all, small_run

pytestmark = pytest.mark.multirank


def place_and_method() -> tuple[str, str | None]:
    return os.environ["RANK"], multiprocessing.get_start_method(allow_none=True)


def test_spawned_ranks_train_what_forked_ranks_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = small_run(tmp_path, method={"name": "ncl"}, train={"micro_batch_size": 2, "steps_per_domain": 2})
    forked = run_ranks(run_all, 2, [{**base, "output_dir": tmp_path / "forked"}])[0][0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert run_ranks(place_and_method, 2) == [("0", "spawn"), ("1", "spawn")]
    spawned = run_ranks(run_all, 2, [{**base, "output_dir": tmp_path / "spawned"}])[0][0]
    assert spawned.loss_matrix == forked.loss_matrix
