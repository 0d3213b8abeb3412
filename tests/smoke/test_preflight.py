"""Preflight on real ranks: ranks that differ, and the command with a failing check."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from das_ds.preflight.rehearsal import NUM_BATCHES, NUM_STEPS
from helpers.commands import program, write_config
from helpers.preflight import CHECKS, different_ranks, equal_on_all, rehearsed
from helpers.run_ranks import run_ranks
from helpers.runs import small_run

pytestmark = pytest.mark.multirank


def test_checks_on_different_ranks_fail_on_all(tmp_path: Path) -> None:
    values = small_run(tmp_path)
    clocks, version, config, settings, corpora, sharing = equal_on_all(run_ranks(different_ranks, 2, values))
    assert all(f.status == "failed" for f in (clocks, version, config, settings, corpora, sharing))
    assert clocks.found.startswith("rank 1 is 60.") and "ahead of rank 0" in clocks.found
    assert version.found.startswith("torch: 9.9 on rank 1, ")
    assert config.found == "config seed: 1 on rank 1, 0 on rank 0"
    assert settings.found == "rank 1 reads another DeepSpeed file than rank 0"
    assert "different files on different ranks" in corpora.found
    assert "rank 0 does not see the file of rank 1" in sharing.found and "share" in sharing.found


def test_rehearsal_times_every_phase_and_leaves_nothing_behind(tmp_path: Path) -> None:
    values = small_run(tmp_path, evaluation={"batch_size": 1}, method={"name": "directions", "num_samples": 40})
    for result, measured in run_ranks(rehearsed, 2, values):
        assert result.status == "ok" and result.found.endswith("s in papers"), result
        assert [len(stage.steps) for stage in measured.steps] == [NUM_STEPS - 1] * 2
        assert [sorted(one.loops) for one in measured.evaluations] == [
            ["evaluate food", "evaluate general", "evaluate papers"]
        ] * 3
        # Of 24 sequences on two ranks.
        loops = [one.loops["evaluate general"] for one in measured.evaluations]
        assert all((loop.num_batches, len(loop.seconds)) == (12, NUM_BATCHES) for loop in loops)
        # Nothing is protected before the first domain; 40 samples are 5 batches of 4 on each of two ranks.
        assert [list(one.loops) for one in measured.before] == [[], ["energy of papers that passes"]]
        assert [[loop.num_batches for loop in one.loops.values()] for one in measured.after] == [[5], [5]]
    assert not list(tmp_path.glob(".*")) and not list((tmp_path / "run").iterdir())


def test_preflight_command_failing_check_exits_with_2(tmp_path: Path) -> None:
    values = small_run(tmp_path)
    values["domains"][1]["train"] = [str(tmp_path / "no_such_file.txt")]
    path = write_config(tmp_path, values)
    done = program("launch/preflight.py", "--json", "--config", path)
    assert done.returncode == 2, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert not report["ok"] and [check["check"] for check in report["checks"]] == CHECKS
    failed = [check for check in report["checks"] if check["status"] != "ok"]
    assert [check["check"] for check in failed] == ["corpora"] and "no_such_file.txt" in failed[0]["found"]
    assert "das_ds: preflight: 1 check failed: corpora" in done.stderr and "Traceback" not in done.stderr
