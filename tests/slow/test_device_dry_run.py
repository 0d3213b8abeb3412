"""Every part of the script for a bare machine runs here as well, in tiny sizes: `make bench-device-dry`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from helpers.commands import ROOT

RESULTS = (
    "environment_cpu",
    "kernels_cpu",
    "mfu_tiny-encoder_cpu",
    "mfu_tiny-decoder_cpu",
    "stop_and_resume_cpu",
    "peers_cpu",
)


@pytest.mark.timeout(1800)
def test_device_run_dry_every_part_passes_and_leaves_its_result(tmp_path: Path) -> None:
    command = [
        "bash",
        str(ROOT / "benchmarks" / "device" / "run.sh"),
        "--dry",
        "--minutes",
        "28",
        "--out",
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1750)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert done.returncode == 0 and summary["failed"] == 0, (summary, (tmp_path / "log.txt").read_text()[-3000:])
    assert {part["outcome"] for part in summary["parts"]} == {"passed"}
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert {f"./{name}.json" for name in RESULTS} <= set(archive.getnames())
