"""Benchmarks are started as modules, without pytest's import path."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]


def test_benchmarks_are_importable_without_pytest() -> None:
    files = sorted((REPOSITORY / "benchmarks").glob("*.py"))
    names = [f"benchmarks.{file.stem}" for file in files if file.stem != "__init__"]
    imports = "\n".join(f"import {name}" for name in [*names, "benchmarks.chaos.job"])
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    finished = subprocess.run(
        [sys.executable, "-c", imports], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
