"""Ranks in a loop of collectives, of which one does something bad: `python -m helpers.watching FOLDER WHAT RANK`."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import torch

from das_ds.distributed.collectives import all_reduce_sum
from das_ds.distributed.launch import Ranks, leave
from das_ds.distributed.watch import LostPeerError, Watch

HANG_TIMEOUT = 4.0
BAD_STEP = 7
EXIT_LOST = 3


def main(folder: Path, what: str, bad_rank: int) -> None:
    """Twenty steps over two ranks; `bad_rank` misbehaves in step 7."""
    ranks = Ranks()
    try:
        with Watch(ranks, HANG_TIMEOUT, folder) as watch:
            watch.phase("food")
            for step in range(1, 21):
                watch.at("reading a batch", step)
                watch.at("forward and backward", step)
                if step == BAD_STEP and ranks.info.rank == bad_rank:
                    misbehave(what, watch)
                all_reduce_sum(torch.ones(1))
                time.sleep(0.02)
    except LostPeerError as error:
        print(f"rank {ranks.info.rank}: {error}", file=sys.stderr)
        leave(EXIT_LOST)
    ranks.close()


def misbehave(what: str, watch: Watch) -> None:
    """Sleep for ever, be stopped or killed, keep Python's lock, fail, or be slow where that is allowed."""
    if what == "sleep":
        sleep_for_ever()
    elif what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "lock":
        # A function called through PyDLL keeps the lock.
        ctypes.PyDLL(None).sleep(600)
    elif what == "fail":
        raise ValueError("no such thing")
    elif what == "patience":
        with watch.patient("exporting"):
            time.sleep(2 * HANG_TIMEOUT)
    else:
        raise AssertionError(what)


def sleep_for_ever() -> None:
    """Hang outside any collective."""
    while True:
        time.sleep(1.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
