"""Methods that weight or replace the losses of tokens, on two ranks at ZeRO 3, equal plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.token_weighting_checks import check_token_weighting_equals_plain_torch

pytestmark = pytest.mark.multirank


def test_eaft_and_replay_kl_stage_3_equal_plain_torch(tmp_path: Path) -> None:
    check_token_weighting_equals_plain_torch(3, 2, tmp_path)
