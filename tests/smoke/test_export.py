"""Exports at ZeRO 3 on three ranks: equal to one file, and no rank ever has the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.export_checks import check_no_rank_has_the_model, check_sharded_export_equals_one_file

pytestmark = pytest.mark.multirank


def test_export_zero3_sharded_equals_one_file(tmp_path: Path) -> None:
    check_sharded_export_equals_one_file("roberta", 3, 3, "bf16", tmp_path)


def test_export_zero3_no_rank_has_the_model(tmp_path: Path) -> None:
    check_no_rank_has_the_model(3, 3, tmp_path)
