"""Job processes: starts the ranks of a job as plain processes, and kills them.

The ranks are forked from a server that has imported the slow libraries, so that a start costs about a second; what runs
in them is the command `das-ds train`.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.chaos.progress_log import ProgressLog, follow
from das_ds.cli import main

NUM_RANKS = 2
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "transformers", "deepspeed", "benchmarks.chaos.progress_log"])


class Job:
    """Two running ranks of one command.

    Args:
        arguments: of `das-ds`.
        log: file to which the output of the ranks is appended.
        progress_path: where rank 0 records its progress.
    """

    def __init__(self, arguments: list[str], log: Path, progress_path: Path) -> None:
        port = _free_port()
        self._processes: list[Any] = [
            _CONTEXT.Process(target=_rank_main, args=(arguments, rank, port, log, progress_path), daemon=True)
            for rank in range(NUM_RANKS)
        ]
        for process in self._processes:
            process.start()

    @property
    def is_running(self) -> bool:
        """Whether any rank is alive."""
        return any(process.is_alive() for process in self._processes)

    def kill(self, ranks: tuple[int, ...]) -> None:
        """Send SIGKILL to some ranks, one right after the other."""
        for rank in ranks:
            self._processes[rank].kill()
        for rank in ranks:
            self._processes[rank].join()

    def wait(self, seconds: float) -> list[int]:
        """Exit codes by rank once all have ended.

        Raises:
            TimeoutError: a rank still runs after so many seconds; all are killed.
        """
        deadline = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(deadline - time.monotonic(), 0.0))
        late = [rank for rank, process in enumerate(self._processes) if process.is_alive()]
        self.kill(tuple(range(NUM_RANKS)))
        if late:
            raise TimeoutError(f"ranks {late} were still running after {seconds} s")
        return [process.exitcode for process in self._processes]


def _rank_main(arguments: list[str], rank: int, port: int, log: Path, progress_path: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(NUM_RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    # tqdm's default lock is a system semaphore, which a killed process leaves behind.
    tqdm.set_lock(threading.RLock())
    if rank == 0:
        follow(ProgressLog(progress_path))
    try:
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of collectives with a dead peer would keep this process alive.
    os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
