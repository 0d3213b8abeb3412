"""Result files of benchmarks, which record device, versions and date; and tables on the terminal."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(os.environ.get("DAS_DS_BENCHMARK_RESULTS", Path(__file__).parent / "results"))
"""Folder of result files: in the repository, unless the environment names another one."""
PACKAGES = ("torch", "transformers", "deepspeed")


def default_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """Name of the device, such as `NVIDIA H200` or `AMD EPYC 9354`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    """Device, threads, versions, date (UTC), and load average, which includes the measurement itself."""
    return {
        "device": device_name(device),
        "num_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def write_result(name: str, device: torch.device, settings: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write `results/<name>_<device type>.json` and return its path."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}_{device.type}.json"
    content = {"environment": describe(device), "settings": settings, "rows": rows}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows with equal keys as a Markdown table; numbers with three decimals, tiny ones in scientific notation."""
    cells = [[_format_cell(value) for value in row.values()] for row in rows]
    for line in (list(rows[0]), ["---"] * len(rows[0]), *cells):
        print("| " + " | ".join(line) + " |")


def _format_cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"
