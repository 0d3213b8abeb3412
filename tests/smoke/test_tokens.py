"""A run whose second domain adds tokens, at ZeRO 3 on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.run_ranks import run_ranks
from helpers.runs import run_all
from helpers.tokens import check_as_if_added_between_two_runs, grown_and_in_two_runs

pytestmark = pytest.mark.multirank


def test_added_tokens_bf16_equal_tokens_added_between_runs(tmp_path: Path) -> None:
    results = run_ranks(run_all, 2, grown_and_in_two_runs(tmp_path, 3, "bf16"))[0]
    check_as_if_added_between_two_runs(tmp_path, results[0], results[2])
