"""The device script: its arguments, and parts that fail without stopping the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from helpers.commands import ROOT

SCRIPT = ROOT / "benchmarks" / "device" / "run.sh"


def run(out: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), "--dry", "--out", str(out), *options]
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def summary(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "summary.json").read_text()))


def test_run_unknown_option_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "--quick")
    assert done.returncode == 2 and "found --quick; allowed: --dry, --minutes M" in done.stderr


def test_run_part_that_fails_is_counted_and_the_next_one_runs(tmp_path: Path) -> None:
    """`--wheels` names an empty folder, so that nothing can be installed."""
    (tmp_path / "wheels").mkdir()
    out = tmp_path / "out"
    done = run(out, "--wheels", str(tmp_path / "wheels"), "--only", "install", "--only", "environment")
    assert done.returncode == 0, done.stderr
    found = summary(out)
    assert found["failed"] == 1
    outcomes = {part["part"]: part["outcome"] for part in found["parts"]}
    assert outcomes["install"].startswith("failed: exit code") and outcomes["environment"] == "passed"
    with tarfile.open(out / "results.tar.gz") as archive:
        assert {"./environment_cpu.json", "./log.txt"} <= set(archive.getnames())
    assert "2 parts, 1 failed" in done.stdout


def test_run_without_time_leaves_parts_out(tmp_path: Path) -> None:
    run(tmp_path, "--minutes", "0", "--only", "environment")
    assert summary(tmp_path)["parts"] == [{"part": "environment", "outcome": "left out: no time", "seconds": 0}]
