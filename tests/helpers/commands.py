"""Commands as users start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def write_config(folder: Path, values: dict[str, Any]) -> Path:
    """A run config as a file."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**values, "output_dir": str(values["output_dir"])}))
    return path


def command(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A finished command, started in the repository."""
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    clean |= {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [str(word) for word in words], cwd=ROOT, env=clean, capture_output=True, text=True, timeout=300, check=False
    )
