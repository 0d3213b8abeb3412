"""Parameter-level importance at the stages, precisions and numbers of ranks that the smoke tests leave out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.parameter_importance import (
    measured_all,
)
from helpers.parameter_importance_checks import (
    check,
    check_files_are_read_and_written_by_any_number_of_ranks,
    check_sums_equal_brute_force,
    check_training_equals_the_reference,
    global_batches,
    settings,
)
from helpers.parity import OFFLOAD
from helpers.run_ranks import run_ranks
from helpers.tiny_models import NO_DROPOUT

pytestmark = pytest.mark.multirank

STAGES = [(0, 1), (0, 2), (1, 2), (2, 1), (2, 2), (3, 1)]


@pytest.mark.parametrize("kind", ["mlm", "proxy"])
@pytest.mark.parametrize(("stage", "world_size"), STAGES)
def test_sums_equal_brute_force(kind: str, stage: int, world_size: int, tmp_path: Path) -> None:
    check_sums_equal_brute_force(kind, stage, world_size, tmp_path)


@pytest.mark.parametrize(
    ("zero", "world_size"),
    [*(({"stage": stage}, ranks) for stage, ranks in STAGES), *(({"stage": s, **OFFLOAD}, 2) for s in (2, 3))],
)
def test_training_equals_the_reference(zero: dict[str, Any], world_size: int, tmp_path: Path) -> None:
    check_training_equals_the_reference(zero, world_size, tmp_path)


@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), (1, 3), (2, 2), (4, 2), (4, 3)])
def test_files_are_read_and_written_by_any_number_of_ranks(world_size: int, stage: int, tmp_path: Path) -> None:
    check_files_are_read_and_written_by_any_number_of_ranks(world_size, stage, tmp_path)


@pytest.mark.parametrize("stage", [2, 3])
def test_sums_under_offload(stage: int, tmp_path: Path) -> None:
    runs = settings(tmp_path, 2, {"stage": stage, **OFFLOAD})
    check(run_ranks(measured_all, 2, runs, "mlm", global_batches(), NO_DROPOUT), "mlm", 1e-5)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_sums_in_bf16(stage: int, tmp_path: Path) -> None:
    runs = settings(tmp_path, 2, {"stage": stage}, precision="bf16")
    check(run_ranks(measured_all, 2, runs, "mlm", global_batches(), NO_DROPOUT), "mlm", 5e-2)


@pytest.mark.parametrize("zero", [{"stage": 1}, {"stage": 2, **OFFLOAD}, {"stage": 3}])
def test_sums_in_fp16_with_overflow(zero: dict[str, Any], tmp_path: Path) -> None:
    # The scale overflows at first and rises after every global batch: each is measured once, by its own scale.
    fp16 = {"initial_scale_power": 24, "hysteresis": 1, "loss_scale_window": 1}
    runs = settings(tmp_path, 2, zero, precision="fp16")
    runs = [run.model_copy(update={"deepspeed": {**run.deepspeed, "fp16": fp16}}) for run in runs]
    check(run_ranks(measured_all, 2, runs, "mlm", global_batches(), NO_DROPOUT), "mlm", 1e-2)
