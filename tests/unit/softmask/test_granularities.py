"""The list of granularities."""

from __future__ import annotations

import subprocess
import sys

import pytest

from das_ds.softmask.granularities import GRANULARITIES, load_granularity


@pytest.mark.parametrize("name", GRANULARITIES)
def test_load_granularity_gives_a_class_with_the_protocol_of_importance(name: str) -> None:
    from das_ds.softmask.importance import Importance

    members = [member for member in vars(Importance) if not member.startswith("_")]
    assert [member for member in members if not hasattr(load_granularity(name), member)] == []


def test_granularities_are_listed_without_loading_the_engine() -> None:
    program = (
        "import sys, das_ds.softmask.granularities; sys.exit('deepspeed' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
