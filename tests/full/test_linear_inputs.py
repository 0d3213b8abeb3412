"""Masked matrices and their inputs of every architecture: two ranks at every ZeRO stage against one rank at stage 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from das_ds.models.architectures.registry import ARCHITECTURES
from helpers.architectures import architecture_config
from helpers.linear_inputs import Found, find_all
from helpers.run_ranks import run_ranks

pytestmark = pytest.mark.multirank

LORA: dict[str, Any] = {"lora": {"rank": 2, "alpha": 8.0}}
FORMS: dict[str, dict[str, Any]] = {"plain": {}, "lora": LORA}


def find_architectures(folder: Path, world_size: int, stage: int, **changes: Any) -> dict[tuple[str, str], Found]:
    """(architecture, form) -> what the first rank found; all ranks found the same matrices."""
    keys = [(model_type, form) for model_type in ARCHITECTURES for form in FORMS]
    configs = [architecture_config(folder, t, world_size, stage, **FORMS[form], **changes) for t, form in keys]
    found: dict[tuple[str, str], Found] = {}
    for results in zip(keys, *run_ranks(find_all, world_size, configs, timeout=540.0), strict=True):
        key, *by_rank = results
        for result in by_rank:
            assert not isinstance(result, str), f"{key}: {result}"
            assert result[0] == by_rank[0][0], key
        found[key] = by_rank[0]
    return found


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Found]:
    return find_architectures(tmp_path_factory.mktemp("one_rank"), 1, 0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_inputs_two_ranks_equal_one_rank(stage: int, one_rank: dict[tuple[str, str], Found], tmp_path: Path) -> None:
    for key, (matrices, sums) in find_architectures(tmp_path, 2, stage).items():
        expected, expected_sums = one_rank[key]
        assert matrices == expected, key
        for name, total in expected_sums.items():
            assert torch.allclose(sums[name], total, rtol=1e-4, atol=1e-4), (key, name)


def test_matrices_bf16_are_those_of_fp32(one_rank: dict[tuple[str, str], Found], tmp_path: Path) -> None:
    for key, (matrices, _) in find_architectures(tmp_path, 2, 3, precision="bf16").items():
        assert matrices == one_rank[key][0], key
