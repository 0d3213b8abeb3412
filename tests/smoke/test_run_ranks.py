"""The harness of the tests of several ranks: how ranks start, and the report of one that fails or hangs."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch

from helpers.run_ranks import process_context, run_ranks

pytestmark = pytest.mark.multirank


def is_warm() -> bool:
    return "helpers.preload" in sys.modules


def fail_on_the_second(how: str) -> None:
    if os.environ["RANK"] == "1":
        if how == "error":
            raise ValueError("no such thing")
        if how == "exit":
            os._exit(3)
        time.sleep(60.0)


def test_run_ranks_preloads_libraries() -> None:
    assert run_ranks(is_warm, 2) == [True, True]


@pytest.mark.parametrize(("num_gpus", "method"), [(0, "forkserver"), (1, "spawn")])
def test_process_context_with_gpu_spawns(num_gpus: int, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork of a process that has asked for the GPU may not use it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert process_context().get_start_method() == method


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("error", "(?s)rank 1 failed:.*ValueError: no such thing"),
        ("exit", "rank 1 died with exit code 3"),
        ("hang", r"time ran out; no result from ranks \[1\]"),
    ],
)
def test_run_ranks_hung_rank_is_named(how: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run_ranks(fail_on_the_second, 2, how, timeout=5.0)
