"""A run that is asked to stop by a signal to one of its ranks."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from das_ds.errors import EXIT_STOPPED
from helpers.command_runs import exit_codes, start_training, take_half_a_second_per_step, wait_until
from helpers.resume import assert_same_run
from helpers.run_ranks import run_ranks
from helpers.runs import last_step, run_all, small_run

pytestmark = pytest.mark.multirank


def test_run_stopped_by_signal_resumes_to_same_result(tmp_path: Path) -> None:
    base = small_run(tmp_path, method={"name": "ncl"}, checkpoint={"interval": 1000})
    base["train"] = {**base["train"], "micro_batch_size": 2, "steps_per_domain": 10, "log_interval": 1}

    def values(name: str) -> dict[str, Any]:
        return {**base, "output_dir": tmp_path / name}

    run_ranks(run_all, 2, [values("complete")])
    folder = tmp_path / "stopped"
    processes = start_training(values("stopped"), tmp_path, 2, take_half_a_second_per_step)
    wait_until(lambda: last_step(folder) >= 3, "the third step")
    os.kill(processes[1].pid, signal.SIGUSR2)
    assert exit_codes(processes) == [EXIT_STOPPED, EXIT_STOPPED]
    assert 3 <= last_step(folder) < 20
    assert exit_codes(start_training(values("stopped"), tmp_path, 2)) == [0, 0]
    assert_same_run(folder, tmp_path / "complete")
