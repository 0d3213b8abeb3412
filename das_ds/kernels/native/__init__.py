"""Native CPU kernels in C++, compiled on first use (a second) where there is a compiler.

The library is compiled in a temporary folder and moved to the cache by one rename: no lock file can be left behind by a
killed process.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from das_ds.kernels.protection import Protection

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "masked.cpp"
# Nothing here reads errno, floating-point traps or the sign of zero, which would keep loops from being vectorized.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros")
PARALLEL_ELEMENTS = 1 << 17
"""Fewest elements that are worth another thread."""
KINDS = {torch.float32: 2, torch.bfloat16: 3, torch.uint8: 4}
NONE = 0
UNITS = 1
POINTER = ctypes.c_void_p
COUNT = ctypes.c_int64
KIND = ctypes.c_int32
NUMBER = ctypes.c_float
PROTECTION = (KIND, POINTER, POINTER, COUNT, POINTER)
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "masked_adamw": (*(POINTER,) * 4, *PROTECTION, COUNT, COUNT, *(NUMBER,) * 7),
    "soft_update": (POINTER, POINTER, COUNT, *PROTECTION, COUNT, COUNT),
}


def use_native(tensor: torch.Tensor) -> bool:
    """Whether the C++ kernels can work on this tensor: it is in host memory and they could be compiled."""
    return tensor.device.type == "cpu" and library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None (which is logged) where they cannot be compiled."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        logger.info("CPU kernels: torch, because there is no C++ compiler (g++, or the one that CXX names)")
        return None
    try:
        loaded = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning("CPU kernels: torch, because %s could not compile or load %s: %s", compiler, SOURCE, reason)
        return None
    logger.info("CPU kernels: C++, compiled with %s", compiler)
    for name, types in SIGNATURES.items():
        getattr(loaded, name).argtypes = types
        getattr(loaded, name).restype = None
    return loaded


def run(name: str, begin: int, end: int, before: tuple[Any, ...], after: tuple[Any, ...] = ()) -> None:
    """Call a kernel on elements [begin, end), with as many threads as torch uses.

    Args:
        name: a key of `SIGNATURES`.
        begin, end: the elements.
        before, after: the kernel's other arguments.
    """
    kernel = getattr(library(), name)
    num_chunks = max(1, min(torch.get_num_threads(), (end - begin) // PARALLEL_ELEMENTS))
    edges = [begin + (end - begin) * chunk // num_chunks for chunk in range(num_chunks + 1)]
    first, *rest = pairwise(edges)
    # ctypes releases the interpreter lock while it is in the kernel.
    futures = [_threads().submit(kernel, *before, *chunk, *after) for chunk in rest]
    kernel(*before, *first, *after)
    for future in futures:
        future.result()


def protection_arguments(protection: Protection) -> tuple[Any, ...]:
    """Arguments of the types `PROTECTION`; the pointers are valid as long as `protection` lives."""
    if protection.importance is not None:
        return KINDS[protection.importance.dtype], protection.importance.data_ptr(), None, 0, None
    if protection.table is not None:
        fields = protection.fields
        return UNITS, None, fields.data_ptr(), len(fields), protection.table.values.data_ptr()
    return NONE, None, None, 0, None


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, torch.get_num_threads()), thread_name_prefix="das_ds-kernels")


def _compiled(compiler: str) -> Path:
    """The shared library for this source, compiler and processor; compiled unless it lies in the cache."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    identity = "\n".join((SOURCE.read_text(encoding="utf-8"), *FLAGS, version, processor()))
    target = _folder() / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / target.name
            command = [compiler, *FLAGS, "-shared", "-fPIC", str(SOURCE), "-o", str(built)]
            subprocess.run(command, capture_output=True, text=True, check=True)
            os.replace(built, target)
    return target


def _folder() -> Path:
    return Path(os.environ.get("DAS_DS_CACHE") or Path.home() / ".cache" / "das_ds") / "kernels"


def processor() -> str:
    """The processor that -march=native depends on: different machines may share the cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
