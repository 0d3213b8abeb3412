"""Stop and resume: a run of two domains that is stopped midway and resumed, compared with an uninterrupted one.

Losses must agree: to the last digit on a CPU, and up to rounding on a GPU, where attention sums its gradients in no
fixed order.

Run: `python -m benchmarks.device.stop_and_resume [--dry]`
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.peers import ROOT, SIZES, Workload, write_run_config, write_text
from benchmarks.result_io import default_device, print_table, write_result
from das_ds.errors import EXIT_STOPPED

TOLERANCE = {"cpu": 0.0, "cuda": 0.02}
"""Nats by which a held-out loss may differ."""
TIMEOUT_S = 100.0


def write_config(work: Workload, folder: Path, name: str) -> Path:
    """Write the config of a das run over two domains."""
    return write_run_config(
        work,
        folder,
        name,
        ["first", "second"],
        method={"name": "das", "importance": {"num_samples": work.batch_size}},
        deepspeed={"zero_optimization": {"stage": work.zero_stage}},
    )


def train(config: Path) -> subprocess.Popen[bytes]:
    """Start `das-ds train`."""
    return subprocess.Popen([sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(config)], cwd=ROOT)


def num_lines(path: Path) -> int:
    """Number of steps logged so far."""
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def stop_after(process: subprocess.Popen[bytes], folder: Path, step: int) -> int:
    """Stop a run after it has logged `step` steps; returns its exit code."""
    deadline = time.monotonic() + TIMEOUT_S
    while num_lines(folder / "metrics.jsonl") < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    (folder / "STOP").touch()
    return process.wait(TIMEOUT_S)


def read_loss_matrix(run_folder: Path) -> torch.Tensor:
    """The loss matrix of a finished run."""
    return torch.tensor(json.loads((run_folder / "results.json").read_text())["loss_matrix"])


def main() -> int:
    """Run both, print the largest difference and write the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="tiny sizes")
    device = default_device()
    precision = "bf16" if device.type == "cuda" else "fp32"
    sizes = ("tiny", 4, 32) if parser.parse_args().dry else ("encoder", 32, 128)
    work = Workload(*sizes, precision=precision, zero_stage=2, steps=60)
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder, SIZES[work.size]["vocab_size"], (work.steps + 2) * work.batch_size * work.sequence_length)
        codes = [train(write_config(work, folder, "uninterrupted")).wait(TIMEOUT_S)]
        config = write_config(work, folder, "resumed")
        codes.append(stop_after(train(config), folder / "resumed", step=5))
        stopped_at = num_lines(folder / "resumed" / "metrics.jsonl")
        codes.append(train(config).wait(TIMEOUT_S))
        rows: list[dict[str, Any]] = []
        if codes == [0, EXIT_STOPPED, 0]:
            uninterrupted = read_loss_matrix(folder / "uninterrupted")
            resumed = read_loss_matrix(folder / "resumed")
            difference = (uninterrupted - resumed).abs().max().item()
            rows.append({"stopped at step": stopped_at, "largest difference": difference})
    if not rows:
        print(f"exit codes: found {codes}, expected {[0, EXIT_STOPPED, 0]}")
        return 1
    print_table(rows)
    print(f"written to {write_result('stop_and_resume', device, vars(work), rows).name}")
    return 0 if rows[0]["largest difference"] <= TOLERANCE[device.type] else 1


if __name__ == "__main__":
    raise SystemExit(main())
