"""Masks of directions on gradients and on updates, on real ranks, against plain torch in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.masked_training import train_plainly
from helpers.masked_training_checks import check_masked_training
from helpers.parity import OFFLOAD, relative_difference

pytestmark = pytest.mark.multirank


def test_forms_differ_from_each_other_and_from_no_mask() -> None:
    weights = [train_plainly(form)[0] for form in (None, "gradient", "update")]
    assert relative_difference(weights[1], weights[0]) > 1e-2
    assert relative_difference(weights[2], weights[0]) > 1e-2
    assert relative_difference(weights[1], weights[2]) > 1e-2


@pytest.mark.parametrize(
    ("zero", "world_size", "precisions"),
    [
        ({"stage": 0}, 1, ("bf16",)),
        ({"stage": 2, **OFFLOAD}, 2, ("bf16",)),
        ({"stage": 3}, 3, ("bf16",)),
    ],
)
def test_masked_training_equals_plain_torch(
    zero: dict[str, Any], world_size: int, precisions: tuple[str, ...], tmp_path: Path
) -> None:
    check_masked_training(tmp_path, world_size, zero, precisions)
