"""Exports at every ZeRO stage and number of ranks: equal to one file, merged and adapters alone, on a full disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.export_checks import (
    check_full_disk_publishes_nothing,
    check_lora_export,
    check_no_rank_has_the_model,
    check_sharded_export_equals_one_file,
)

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_export_sharded_equals_one_file(stage: int, world_size: int, precision: str, tmp_path: Path) -> None:
    check_sharded_export_equals_one_file("roberta", stage, world_size, precision, tmp_path)


# A head that comes before the embedding that it is tied to; experts that are stored one by one.
@pytest.mark.parametrize("model_type", ["xlm-roberta", "mixtral"])
@pytest.mark.parametrize(("stage", "world_size"), [(2, 2), (3, 3)])
def test_export_sharded_equals_one_file_of_other_architectures(
    model_type: str, stage: int, world_size: int, tmp_path: Path
) -> None:
    check_sharded_export_equals_one_file(model_type, stage, world_size, "bf16", tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("stage", "world_size"), [(0, 2), (2, 1), (2, 3), (3, 1), (3, 2), (3, 3)])
def test_export_lora_merged_and_adapters(stage: int, world_size: int, precision: str, tmp_path: Path) -> None:
    check_lora_export(stage, world_size, precision, tmp_path)


@pytest.mark.parametrize(("stage", "world_size"), [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_export_no_rank_has_the_model(stage: int, world_size: int, tmp_path: Path) -> None:
    check_no_rank_has_the_model(stage, world_size, tmp_path)


@pytest.mark.parametrize("full_rank", [0, 1])
def test_export_full_disk_of_any_rank_publishes_nothing(full_rank: int, tmp_path: Path) -> None:
    check_full_disk_publishes_nothing(3, 2, full_rank, tmp_path)
