"""What methods keep, by hand."""

from __future__ import annotations

from typing import Any

import pytest
from das_ds.preflight.method_memory import kept_in_checkpoint

from das_ds.config import MethodConfig, RunConfig
from das_ds.config.deepspeed import build_engine_config
from das_ds.preflight.memory import estimate_run_memory
from das_ds.preflight.memory_estimate import ModelSize

SIZE = ModelSize(
    trained=1000,
    total=1200,
    largest_layer=500,
    num_units=50,
    num_layers=2,
    hidden=24,
    inner=40,
    heads=3,
    vocabulary=100,
)
# 16 tokens and 8 answers: 4 x 16 + 8 x (8 + 2 x 24).
ROW = 512


def config(name: str, stage: int = 2, precision: str = "bf16") -> RunConfig:
    values: dict[str, Any] = {
        "output_dir": "run",
        "model": {"config": {"model_type": "roberta"}},
        "domains": [{"name": "acl", "train": ["acl.txt"]}],
        "data": {"sequence_length": 16},
        "train": {"global_batch_size": 32, "micro_batch_size": 4, "precision": precision},
        "method": {"name": name, "derpp": {"capacity": 11, "max_positions": 8}},
        "deepspeed": {"zero_optimization": {"stage": stage}},
    }
    return RunConfig.model_validate(values)


@pytest.mark.parametrize(
    ("name", "stage", "precision", "part", "expected"),
    [
        ("ewc", 2, "bf16", "Fisher information", 2000),
        ("ewc", 0, "bf16", "Fisher information", 8000),
        ("kd", 2, "bf16", "teacher", 2000),
        ("kd", 0, "fp32", "teacher", 4000),
        ("kd", 3, "fp16", "teacher", 500),
        # Eleven rows on four ranks are three on the first.
        ("derpp", 3, "bf16", "buffer", 3 * ROW),
    ],
)
def test_kept_by_a_rank(name: str, stage: int, precision: str, part: str, expected: int) -> None:
    run = config(name, stage, precision)
    found, plain = (
        estimate_run_memory(c, SIZE, build_engine_config(c, 4), 4) for c in (run, config("ncl", stage, precision))
    )
    assert found.device == {**plain.device, part: expected}
    copied = kept_in_checkpoint(run, SIZE, in_domain=True) // (1 if stage == 0 else 4)
    assert found.host["copy of a checkpoint"] - plain.host["copy of a checkpoint"] == copied


def test_what_masks_of_directions_take() -> None:
    direction = {"granularity": "direction", "normalization": "saturating"}
    method = MethodConfig.model_validate({"name": "das", "contrastive": {"weight": 0.0}, "importance": direction})
    run = config("das").model_copy(update={"method": method})
    found = estimate_run_memory(run, SIZE, build_engine_config(run, 4), 4)
    # Two layers of five matrices that read 24 numbers and one that reads 40, and two of the LM head.
    moments = 4 * (2 * (5 * 24**2 + 40**2) + 2 * 24**2)
    assert found.device["direction masks"] == found.host["moments of inputs"] == moments
    assert found.device["weights before the step"] == 1000
    assert [kept_in_checkpoint(run, SIZE, in_domain=is_in) for is_in in (True, False)] == [moments, moments]


def test_kept_in_host_memory() -> None:
    run = config("merge")
    found = estimate_run_memory(run, SIZE, build_engine_config(run, 4), 4)
    assert found.host["weights before the domain"] == 1000
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    offloaded = config("ewc").model_copy(update={"deepspeed": {"zero_optimization": zero}})
    found = estimate_run_memory(offloaded, SIZE, build_engine_config(offloaded, 4), 4)
    assert found.host["Fisher information"] == 2000 and "Fisher information" not in found.device


def test_kept_in_checkpoints() -> None:
    kept = {
        name: [kept_in_checkpoint(config(name), SIZE, in_domain=is_in) for is_in in (True, False)]
        for name in ("ewc", "kd", "derpp", "merge", "ncl", "das")
    }
    assert kept == {
        "ewc": [8000, 4000],
        "kd": [2000, 0],
        "derpp": [11 * ROW] * 2,
        "merge": [4000, 0],
        "ncl": [0, 0],
        "das": [0, 0],
    }
