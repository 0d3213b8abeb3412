"""Forms of the mask on two ranks at ZeRO 3, against full tensors."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.mask_checks import check_forms_and_masks_equal_those_of_full_tensors

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize("stage", [3])
def test_normalization_and_masks_equal_complete_tensors(stage: int, tmp_path: Path) -> None:
    check_forms_and_masks_equal_those_of_full_tensors(stage, tmp_path)
