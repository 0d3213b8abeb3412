"""Masks in Hugging Face's Trainer under DeepSpeed ZeRO 3 on two ranks, against das_ds's own trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.integration_checks import check_trainer

pytestmark = pytest.mark.multirank


def test_trainer_under_zero3_equals_own_trainer_and_resumes(tmp_path: Path) -> None:
    check_trainer(tmp_path, 2, {"stage": 3})
