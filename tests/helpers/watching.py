"""Ranks in a loop of collectives under a watchdog, one of which does something bad."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from das_ds.distributed.collectives import all_reduce_max, all_reduce_sum
from das_ds.distributed.flag_sync import Flags, FlagSync
from das_ds.distributed.process_group import hard_exit, init_process_group
from das_ds.fault_tolerance import watchdog as watchdog_module
from das_ds.fault_tolerance.stack_dump import StackReport, inspect_stacks
from das_ds.fault_tolerance.watchdog import PeerLostError, Watchdog
from das_ds.run_dir import RunDir
from helpers.run_ranks import start_ranks
from helpers.waiting import until

HANG_TIMEOUT = 5.0
BAD_STEP = 7
EXIT_LOST = 3
HEALTHY = ("silent", "broken", "blind")
"""A rank trains on beyond the hang timeout though its heartbeat or its watchdog does not work."""


def exit_codes(folder: Path, what: str, bad_rank: int, world_size: int = 2) -> list[int | None]:
    """Exit codes of ranks of which one misbehaves; None: still there a minute later. Errors are in `errors-<rank>`."""
    processes = start_ranks(steps, world_size, folder, what, bad_rank)
    deadline = time.monotonic() + 60
    try:
        for rank, process in enumerate(processes):
            # A rank that is stopped, or keeps Python's lock, is left for the launcher to kill.
            if what not in ("stop", "lock") or rank != bad_rank:
                process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def suspended_exit_codes(folder: Path) -> list[int | None]:
    """Exit codes of two ranks that are suspended together for longer than the hang timeout, and then continue."""
    processes = start_ranks(steps, 2, folder, "patience", 0)
    try:
        until(lambda: all((folder / f"started-{rank}").exists() for rank in range(2)), 60.0)
        for process in processes:
            os.kill(process.pid, signal.SIGSTOP)
        time.sleep(HANG_TIMEOUT + 4.0)
        for process in processes:
            os.kill(process.pid, signal.SIGCONT)
        for process in processes:
            process.join(60.0)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def steps(folder: Path, what: str, bad_rank: int) -> None:
    """Twenty steps, in the seventh of which `bad_rank` misbehaves."""
    rank = int(os.environ["RANK"])
    os.dup2(os.open(folder / f"errors-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    ranks = init_process_group()
    flag_sync = FlagSync(ranks)
    try:
        with Watchdog(ranks, HANG_TIMEOUT, RunDir(folder)) as watchdog:
            watchdog.set_phase("food")
            (folder / f"started-{rank}").touch()
            for step in range(1, 21):
                watchdog.beat("reading a batch", step)
                watchdog.beat("forward and backward", step)
                if step == BAD_STEP and rank == bad_rank:
                    misbehave(what, watchdog)
                if what == "direct":
                    # As DeepSpeed does, without telling the watchdog.
                    dist.all_reduce(torch.ones(1))
                else:
                    all_reduce_sum(torch.ones(1))
                flag_sync.exchange(Flags())
                if what in HEALTHY and step > BAD_STEP:
                    time.sleep(HANG_TIMEOUT / 8)
            flag_sync.wait()
    except PeerLostError as error:
        os.write(2, f"lost: {error}\n".encode())
        hard_exit(EXIT_LOST)
    ranks.close()


def misbehave(what: str, watchdog: Watchdog) -> None:
    """Sleep for ever, be stopped or killed, keep Python's lock, fail, be slow where that is due, or lose a thread."""
    # The others know the location of this rank from its heartbeats, which are sent once in a while.
    time.sleep(1.5)
    if what in ("sleep", "direct"):
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
    elif what == "silent":
        watchdog._store._publish = lambda: None  # type: ignore[method-assign]
    elif what == "broken":
        watchdog._store._publish = break_down  # type: ignore[method-assign]
        watchdog._store._read = break_down  # type: ignore[method-assign]
    elif what == "blind":
        watchdog._check = break_down  # type: ignore[method-assign]
    else:
        assert what == "patience"
        with watchdog.suspend_timeout("exporting"):
            time.sleep(1.5 * HANG_TIMEOUT)


def break_down() -> None:
    """An unexpected error, like one that Python 3.11 once caused."""
    raise AttributeError("'tuple' object has no attribute 'f_code'")


def sleep_for_ever() -> None:
    """Hang outside any collective."""
    while True:
        time.sleep(1.0)


def stressed_steps(folder: Path, seconds: float, suspects: bool) -> tuple[int, int, int]:
    """Short steps with deep stacks and much garbage under a watchdog that is a hundred times as eager as usual.

    Args:
        folder: run folder.
        seconds: about how long.
        suspects: whether a thread reads all stacks 200 times a second, as once a second where a stall is suspected.
            Without a pause, a hundred thousand times in half a minute, CPython 3.11's own reader has crashed once.

    Returns:
        (steps, heartbeats, times that stacks were read).
    """
    gc.set_threshold(20)
    sys.setswitchinterval(1e-4)
    inspections = 0

    def inspect(thread: int) -> StackReport:
        nonlocal inspections
        inspections += 1
        return inspect_stacks(thread)

    watchdog_module.inspect_stacks = inspect
    # No Python code may walk the frames of another thread.
    sys._current_frames = break_down  # type: ignore[assignment]
    ranks = init_process_group()
    main = threading.get_ident()
    ended = threading.Event()
    step = 0
    with patch.object(watchdog_module, "PERIOD_S", 0.01), Watchdog(ranks, 60.0, folder) as watchdog:
        suspecting = threading.Thread(target=lambda: [inspect(main) for _ in iter(lambda: ended.wait(0.005), True)])
        if suspects:
            suspecting.start()
        deadline = time.monotonic() + seconds
        while all_reduce_max(torch.tensor(float(time.monotonic() < deadline))):
            step += 1
            watchdog.beat("forward and backward", step)
            descend(1 + 97 * step % 400)
        ended.set()
        if suspects:
            suspecting.join()
        heartbeats = watchdog._seq
    ranks.close()
    return step, heartbeats, inspections


def descend(depth: int) -> list[Any]:
    """A stack of so many frames, each of which leaves a circle of garbage behind."""
    circle: list[Any] = []
    circle.append(circle)
    return sorted(descend(depth - 1), key=id) if depth else [value for value in (1, 2, 3) if value]


def agreed_flags() -> dict[str, Any]:
    """Flags read at each boundary: rank 1 asks for a save at the second, rank 0 for a stop at the third."""
    ranks = init_process_group()
    rank = ranks.info.rank
    flag_sync = FlagSync(ranks)
    last = ranks.info.world_size - 1
    reported = [Flags(), Flags(save=rank == last, writing=rank == 0), Flags(stop=rank == 0), Flags(failed=rank == last)]
    read = [flag_sync.exchange(flags) for flags in reported]
    settled = [flag_sync.wait(), flag_sync.wait(), flag_sync.exchange(Flags())]
    flag_sync.wait()
    reasons = [flag_sync.stop_reasons(text) for text in ("SIGTERM" if rank == 0 else None, "the same", f"own {rank}")]
    return {"read": read, "settled": settled, "reasons": reasons}
