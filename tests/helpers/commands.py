"""Commands as users start them."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from helpers.ports import reserve_port
from helpers.run_ranks import preload, process_context

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
QUICK_START = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
"""Environment of processes on a shared processor. DeepSpeed would load torch's compiler, which nothing here uses."""
PATIENCE_S = 300.0
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def write_config(folder: Path, values: dict[str, Any]) -> Path:
    """A run config as a file."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**values, "output_dir": str(values["output_dir"])}))
    return path


def command(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A finished command, started in the repository."""
    clean = {key: value for key, value in os.environ.items() if key not in _OF_RANKS}
    clean |= {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)} | QUICK_START | environment
    return subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def on_two_ranks(*words: object) -> subprocess.CompletedProcess[str]:
    """`command` under DeepSpeed's launcher, at a port that no other test uses."""
    return command("deepspeed", "--num_accelerators", 2, "--master_port", reserve_port(), *words)


def program(path: str, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`command(sys.executable, path, *words)` without the wait for its libraries, which the fork server has loaded."""
    arguments = [path, *map(str, words)]
    with TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = process_context().Process(target=_run_program, args=(arguments, environment, files), daemon=True)
        process.start()
        process.join(PATIENCE_S)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(arguments, PATIENCE_S)
        return subprocess.CompletedProcess(arguments, process.exitcode, *(file.read_text() for file in files))


def _run_program(arguments: list[str], environment: dict[str, str], files: list[Path]) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), number)
    for name in _OF_RANKS:
        os.environ.pop(name, None)
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    preload()
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
