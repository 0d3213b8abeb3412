"""Runs a plain function on N real processes over gloo; a hang is a failure, and the first failing rank is named."""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
import queue
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any
from unittest.mock import patch

import torch

from helpers.ports import reserve_port

PRELOADED = ["torch", "transformers", "deepspeed", "helpers.preload"]


def process_context() -> Any:
    """How processes of tests are started.

    A server imports the slow libraries once, and ranks are forked from it in a fraction of a second. Where there is a
    GPU, DeepSpeed asks for it when it is imported, after which no forked process may use CUDA: there every rank is
    spawned.
    """
    if torch.cuda.device_count() > 0:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # Python 3.11 does not tell the server where to import from, and it silently skips what it cannot import:
    # every rank would then do so by itself, for ten seconds.
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        forkserver.ensure_running()
    return context


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """Results of `function(*args)` on every rank, in rank order.

    Args:
        function: importable by name (defined in `helpers`), so that a new process can find it.
        world_size: number of processes.
        args: picklable.
        timeout: seconds until all processes are killed.

    Raises:
        RuntimeError: a rank failed (with its traceback), died, or the time ran out.
    """
    results: Any = process_context().Queue()
    port = reserve_port()
    packed = _packed(args)
    processes = _started(
        _rank_main, [(function, packed, rank, world_size, port, results) for rank in range(world_size)]
    )
    try:
        return _collect(results, processes, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def start_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Processes that run `function(*args)` as ranks, for tests of how they end; the caller waits for and kills them."""
    port = reserve_port()
    return _started(_lone_rank_main, [(function, args, rank, world_size, port) for rank in range(world_size)])


def _started(target: Callable[..., None], args_of_ranks: list[tuple[Any, ...]]) -> list[Any]:
    context = process_context()
    processes = [context.Process(target=target, args=args, daemon=True) for args in args_of_ranks]
    for process in processes:
        process.start()
    return processes


def _collect(results: Any, processes: list[Any], deadline: float) -> list[Any]:
    values: dict[int, Any] = {}
    while len(values) < len(processes):
        try:
            rank, failure, value = results.get(timeout=0.2)
        except queue.Empty:
            dead = [rank for rank, p in enumerate(processes) if p.exitcode not in (None, 0) and rank not in values]
            if dead:
                raise RuntimeError(f"rank {dead[0]} died with exit code {processes[dead[0]].exitcode}") from None
            if time.monotonic() > deadline:
                waiting = sorted(set(range(len(processes))) - set(values))
                raise RuntimeError(f"time ran out; no result from ranks {waiting}") from None
            continue
        if failure is not None:
            raise RuntimeError(f"rank {rank} failed:\n{failure}")
        values[rank] = _unpacked(value)
    return [values[rank] for rank in sorted(values)]


def _rank_main(function: Callable[..., Any], args: bytes, rank: int, world_size: int, port: int, results: Any) -> None:
    _become_rank(rank, world_size, port)
    try:
        results.put((rank, None, _packed(function(*_unpacked(args)))))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
    results.close()
    results.join_thread()
    # A peer that failed leaves collectives behind whose threads would keep this process alive.
    os._exit(0)


def _lone_rank_main(function: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, port: int) -> None:
    _become_rank(rank, world_size, port)
    function(*args)


def preload() -> None:
    """Import what the fork server has imported already, where there is one."""
    for name in PRELOADED:
        importlib.import_module(name)


def _become_rank(rank: int, world_size: int, port: int) -> None:
    preload()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)


def _packed(value: Any) -> bytes:
    # Between processes tensors would travel as shared memory: a file handle each, which dies with its process.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(value: bytes) -> Any:
    return torch.load(io.BytesIO(value), weights_only=False)
