"""A minute of short steps, deep stacks and collected garbage on a busy machine: the watchdog touches nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.run_ranks import run_ranks
from helpers.watching import stressed_steps

pytestmark = pytest.mark.multirank

SECONDS = 60.0


@pytest.fixture
def busy_machine() -> Iterator[None]:
    """Two processes that take all the time they get."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


@pytest.mark.usefixtures("busy_machine")
@pytest.mark.parametrize("suspects", [False, True], ids=["healthy", "suspected"])
def test_watchdog_stressed_run_completes(suspects: bool, tmp_path: Path) -> None:
    found = run_ranks(stressed_steps, 2, tmp_path, SECONDS / 2, suspects)
    for steps, heartbeats, inspections in found:
        assert steps > 100 and heartbeats > 100
        # In a run that trains no stack is ever read; where it is, nothing breaks.
        assert inspections > 100 if suspects else inspections == 0
    assert not list(tmp_path.glob("hang*"))
