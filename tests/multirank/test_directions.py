"""Soft masks of directions over two domains against plain torch in float64, at every stage, in 16 bits, offloaded."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.parity import OFFLOAD, configs_of, relative_difference
from helpers.run_ranks import run_ranks
from helpers.two_domains import Expected, learn_all, learn_plainly
from multirank.test_ewc_and_merge import domains

pytestmark = pytest.mark.multirank

SATURATION = 0.5
METHOD: dict[str, Any] = {
    "name": "das",
    "importance": {"granularity": "direction", "normalisation": "saturating", "saturation": SATURATION},
    "contrast": {"weight": 0.0},
}


@cache
def expected() -> Expected:
    return learn_plainly(domains(), saturation=SATURATION)


def test_the_mask_matters() -> None:
    without = learn_plainly(domains())
    assert relative_difference(expected().weights[1], without.weights[1]) > 1e-2
    assert relative_difference(expected().weights[0], without.weights[0]) == 0.0


@pytest.mark.parametrize(
    ("zero", "world_size", "precision"),
    [
        ({"stage": 0}, 2, "bf16"),
        ({"stage": 1}, 2, "fp16"),
        ({"stage": 2, **OFFLOAD}, 2, None),
        # Four ranks cut rows of most matrices, some of them twice.
        ({"stage": 3}, 4, "bf16"),
        ({"stage": 3, **OFFLOAD}, 2, None),
    ],
)
def test_two_domains_equal_plain_torch(
    zero: dict[str, Any], world_size: int, precision: str | None, tmp_path: Path
) -> None:
    runs = configs_of(tmp_path, world_size, zero, [METHOD])
    if precision is not None:
        runs += configs_of(tmp_path, world_size, zero, [METHOD], precision)
    found = run_ranks(learn_all, world_size, runs, domains())[0]
    for mine, theirs in zip(found[0].weights, expected().weights, strict=True):
        assert relative_difference(mine, theirs) <= 2e-5
    for rounded in found[1:]:
        mine, theirs = (
            torch.cat([(second[n] - first[n]).flatten().double() for n in first if "key.bias" not in n])
            for first, second in (rounded.weights, expected().weights)
        )
        assert torch.nn.functional.cosine_similarity(mine, theirs, dim=0) > 0.97
