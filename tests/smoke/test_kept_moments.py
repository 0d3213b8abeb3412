"""Moments kept at the border of domains: several domains are one, where everything is sharded."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.kept_moments_checks import check_divided_run_equals_one, check_kept_moments_are_masked

pytestmark = pytest.mark.multirank


def test_domains_with_kept_moments_are_one(tmp_path: Path) -> None:
    check_divided_run_equals_one(tmp_path, stage=3, world_size=2, precision="fp32")


def test_kept_first_moments_are_masked(tmp_path: Path) -> None:
    check_kept_moments_are_masked(tmp_path, stage=2, world_size=2)
