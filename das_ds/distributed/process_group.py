"""From environment variables to a process group: deepspeed, torchrun, srun and plain python start the same program."""

from __future__ import annotations

import logging
import os
import random
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed
import numpy
import torch
import torch.distributed as dist
from torch import nn

from das_ds.distributed.collectives import in_collective
from das_ds.distributed.environment import check_device, check_environment
from das_ds.distributed.rendezvous import report_missing_ranks
from das_ds.errors import DasError

T = TypeVar("T")

# Slow preparation (tokenising a large corpus) happens on one rank while the others wait for it.
LONG_TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class RankInfo:
    """Where this process stands."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


class ProcessGroup:
    """The process group of a run: who this rank is, and waiting for each other without a collective time-out.

    Args:
        timeout: how long to wait for all ranks to start, and for each collective; None: DeepSpeed's default.
        collective_timeout: for each collective, where it is to be another.
    """

    def __init__(self, timeout: timedelta | None = None, collective_timeout: timedelta | None = None) -> None:
        _fill_environment()
        check_environment()
        # Its warnings about an untested optimizer and its own deprecated calls are nothing that a user can act on.
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
        on_gpu = torch.cuda.is_available()
        local_rank = int(os.environ["LOCAL_RANK"])
        device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
        if on_gpu:
            check_device(local_rank, torch.cuda.device_count())
            torch.cuda.set_device(device)
        # On CPU DeepSpeed would compile its shared-memory all-reduce at the first start, guarded by a lock file that a
        # killed process leaves behind and every later start waits for; gloo needs no compiler and no lock.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        if not dist.is_initialized():
            with report_missing_ranks(timeout):
                deepspeed.init_distributed(
                    "nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False, **options
                )
        self.info = RankInfo(dist.get_rank(), local_rank, dist.get_world_size(), device)
        # Ranks that start together meet soon; only what they wait for later may take any time.
        self._patient_group = dist.new_group(backend="gloo", **options)
        dist.distributed_c10d._set_pg_timeout(LONG_TIMEOUT, self._patient_group)
        self._collective_timeout = timeout if collective_timeout is None else collective_timeout
        self.limit_collectives()

    def limit_collectives(self) -> None:
        """Give every process group but the patient ones this run's time for a collective.

        To be called again when a library has made groups: torch gives each of them its backend's own time, which is
        shorter or longer, and DeepSpeed reduces and gathers in nothing but its own groups.
        """
        if self._collective_timeout is None:
            return
        for group in list(dist.distributed_c10d._world.pg_map):
            if group_timeout(group) != LONG_TIMEOUT:
                dist.distributed_c10d._set_pg_timeout(self._collective_timeout, group)

    def main_process_first(self, prepare: Callable[[], T]) -> T:
        """Run `prepare` on rank 0, then on the first rank of each node, then everywhere; all wait for each other.

        What rank 0 leaves in a shared cache the others find there; where nodes share no folder, one rank per node
        prepares its own copy.

        Raises:
            DasError: on every rank, when it was raised on any.
        """
        result: T | None = None
        for has_turn in (self.info.is_main, self.info.local_rank == 0, True):
            failure: DasError | None = None
            if has_turn and result is None:
                try:
                    result = prepare()
                except DasError as error:
                    failure = error
            self.agree(failure)
        assert result is not None
        return result

    def agree(self, failure: DasError | None) -> None:
        """Raise on every rank the first error that any rank has."""
        for error in self.gather(failure):
            if error is not None:
                raise error

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank, however long one of them takes."""
        values: list[Any] = [None] * self.info.world_size
        with in_collective():
            dist.all_gather_object(values, value, group=self._patient_group)
        return values

    def run_on_main(self, do: Callable[[], T]) -> T | None:
        """Run on rank 0 while the others wait; its result there, None elsewhere.

        Raises:
            DasError: on every rank, when it was raised on rank 0.
        """
        result, failure = None, None
        if self.info.is_main:
            try:
                result = do()
            except DasError as error:
                failure = error
        self.agree(failure)
        return result

    def all_gather_cpu(self, part: torch.Tensor, size: int) -> torch.Tensor:
        """The parts of all ranks one after the other, every part padded to `size` elements; in host memory.

        Args:
            part: (n,) with n <= size, on the host.
        """
        padded = nn.functional.pad(part, (0, size - part.numel())) if part.numel() < size else part
        parts = torch.empty(self.info.world_size * size, dtype=part.dtype)
        with in_collective():
            dist.all_gather_into_tensor(parts, padded, group=self._patient_group)
        return parts

    def barrier(self) -> None:
        """Wait for all ranks, however long one of them writes or prepares."""
        with in_collective():
            dist.barrier(group=self._patient_group)

    def close(self) -> None:
        """End the process group."""
        dist.destroy_process_group()


def group_timeout(group: dist.ProcessGroup) -> timedelta:
    """How long a collective of this group may take."""
    timeout: timedelta = group._get_backend(group._device_types[0]).options._timeout
    return timeout


def seed_everything(seed: int) -> None:
    """Seed the generators behind dropout and random weights on this rank."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _fill_environment() -> None:
    """Complete RANK, WORLD_SIZE and LOCAL_RANK: srun sets its own names only, plain python none at all."""
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
        os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port()) if os.environ["WORLD_SIZE"] == "1" else "29500"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def leave(exit_code: int) -> None:
    """End this process at once if it is in a process group; otherwise return.

    A group that is not closed by all its ranks has threads that may abort the process on its way out, and the exit code
    would be lost.
    """
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
