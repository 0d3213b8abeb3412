"""DeepSpeed's C++ optimizers, compiled once and kept for all later test runs."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import IO

import torch
from torch.utils import cpp_extension

from das_ds.kernels.native import processor

LONGEST_COMPILATION_S = 900.0


class ProcessLock:
    """Has the methods of torch's `FileBaton`, whose file outlives a killed process and is then waited for without end.

    The system takes this one from a process that ends, however it ends.
    """

    def __init__(self, path: str) -> None:
        # Not torch's own file: processes that know nothing of this class would wait for it.
        self._path = f"{path}.held"
        self._file: IO[str] | None = None

    def try_acquire(self) -> bool:
        """True, when all others have released it."""
        self._file = open(self._path, "w")  # noqa: SIM115
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        """Let the next one in."""
        assert self._file is not None
        self._file.close()


def keep_compiled_ops() -> None:
    """Have this process and those it starts compile into, and load from, a folder of the user's cache."""
    folder = _folder()
    remove_stale_locks(folder)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    cpp_extension.FileBaton = ProcessLock  # type: ignore[assignment,misc]


def remove_stale_locks(folder: Path) -> None:
    """Remove torch's own lock files of commands that were killed while they compiled: later ones would wait
    forever."""
    for lock in folder.glob("*/lock"):
        if time.time() - lock.stat().st_mtime > LONGEST_COMPILATION_S:
            lock.unlink(missing_ok=True)


def _folder() -> Path:
    """Libraries compiled by other versions, or for another processor, are in other folders."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    compiled_by = "none"
    if compiler is not None:
        compiled_by = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = (sys.version, torch.__version__, version("deepspeed"), compiled_by, processor())
    cache = Path(os.environ.get("DAS_DS_CACHE") or Path.home() / ".cache" / "das_ds")
    return cache / "torch_extensions" / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
