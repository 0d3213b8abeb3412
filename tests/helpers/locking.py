"""A process that only locks a run folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers.commands import ROOT

_HOLD = """
import sys
from pathlib import Path
from das_ds.training.run_lock import RunLock
with RunLock(Path(sys.argv[1]), print) as lock:
    lock.acquire()
    print("held", flush=True)
    sys.stdin.read()
"""
_HOLD_LOCK_OF_THE_FILE_SYSTEM = """
import fcntl, sys
file = open(sys.argv[1] + "/run.lock", "r+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def holding_process(folder: Path, *, only_lock_of_file_system: bool = False) -> Iterator[int]:
    """Its number; it is killed at the end, as by SIGKILL.

    Args:
        folder: the locked one.
        only_lock_of_file_system: it writes nothing into the lock file, which has to be there.
    """
    script = _HOLD_LOCK_OF_THE_FILE_SYSTEM if only_lock_of_file_system else _HOLD
    command = [sys.executable, "-c", script, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process.pid
    finally:
        process.kill()
        process.communicate()
