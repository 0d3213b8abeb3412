"""Process group of a run, from the environment variables of deepspeed, torchrun, srun or none (plain python)."""

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

import numpy
import torch
import torch.distributed as dist
from torch import nn

from das_ds.distributed.collectives import in_collective
from das_ds.distributed.environment import check_device, check_environment
from das_ds.distributed.rendezvous import report_missing_ranks
from das_ds.distributed.torch_internals import all_process_groups, group_timeout, set_group_timeout
from das_ds.errors import DasError

T = TypeVar("T")

LONG_TIMEOUT = timedelta(days=7)
"""For groups in which ranks wait for one that does slow work alone, such as tokenizing a large corpus."""


@dataclass(frozen=True)
class RankInfo:
    """Which rank this process is."""

    rank: int
    local_rank: int
    """Rank among the processes of this node, and number of its GPU."""
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


class ProcessGroup:
    """The process group of a run: who this rank is, and waiting for each other without a collective time-out.

    Made by `init_process_group` or `adopt_process_group`, on all ranks together.

    Args:
        info: this rank.
        cpu_group: gloo group of all ranks, whose collectives may take up to `LONG_TIMEOUT`; None: there is one rank, in
            no group.
        collective_timeout: time-out of collectives of every other group; None: that of their backend.
    """

    def __init__(
        self, info: RankInfo, cpu_group: dist.ProcessGroup | None, collective_timeout: timedelta | None
    ) -> None:
        self.info = info
        self._cpu_group = cpu_group
        self._collective_timeout = collective_timeout

    def limit_collectives(self) -> None:
        """Give every process group but those with `LONG_TIMEOUT` this run's time-out for collectives.

        To be called again when a library has made groups: torch gives each of them its backend's own time-out, which
        is shorter or longer, and DeepSpeed reduces and gathers in nothing but its own groups.
        """
        if self._collective_timeout is None:
            return
        for group in all_process_groups():
            if group_timeout(group) != LONG_TIMEOUT:
                set_group_timeout(group, self._collective_timeout)

    def main_process_first(self, prepare: Callable[[], T]) -> T:
        """Run `prepare` on rank 0, then on the first rank of each node, then everywhere; all wait for each other.

        The other ranks find the result of rank 0 in a shared cache; where nodes share no folder, one rank per node
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
            # Also the barrier between the turns.
            self.raise_on_all_ranks(failure)
        assert result is not None
        return result

    def raise_on_all_ranks(self, failure: DasError | None) -> None:
        """Raise on every rank the first error that any rank has."""
        # Errors are gathered as objects, so that every rank raises the same class with the same message.
        for error in self.all_gather_object(failure):
            if error is not None:
                raise error

    def all_gather_object(self, value: T) -> list[T]:
        """The values of all ranks, in rank order, on every rank; a rank may take any time to come here."""
        if self._cpu_group is None:
            return [value]
        values: list[Any] = [None] * self.info.world_size
        with in_collective():
            dist.all_gather_object(values, value, group=self._cpu_group)
        return values

    def run_on_main(self, do: Callable[[], T]) -> T | None:
        """Run on rank 0 while the others wait; its result there, None elsewhere.

        Raises:
            DasError: on every rank, when it was raised on rank 0.
        """
        result: T | None = None
        failure: DasError | None = None
        if self.info.is_main:
            try:
                result = do()
            except DasError as error:
                failure = error
        self.raise_on_all_ranks(failure)
        return result

    def all_gather_cpu(self, shard: torch.Tensor, size: int) -> torch.Tensor:
        """The shards of all ranks in rank order, each padded with zeros to `size` elements; in host memory.

        Args:
            shard: (n,) with n <= size, on the host.

        Returns:
            (world_size * size,).
        """
        # all_gather_into_tensor needs shards of equal size.
        padded = nn.functional.pad(shard, (0, size - shard.numel())) if shard.numel() < size else shard
        gathered = torch.empty(self.info.world_size * size, dtype=shard.dtype)
        with in_collective():
            dist.all_gather_into_tensor(gathered, padded, group=self._cpu_group)
        return gathered

    def gather_cpu(self, shard: torch.Tensor, size: int, owner: int) -> torch.Tensor | None:
        """As `all_gather_cpu`, on one rank alone; None on the others.

        Args:
            shard: (n,) with n <= size, on the host.
            size: the same on all ranks.
            owner: the rank.
        """
        padded = nn.functional.pad(shard, (0, size - shard.numel())) if shard.numel() < size else shard
        is_owner = self.info.rank == owner
        gathered = torch.empty(self.info.world_size * size if is_owner else 0, dtype=shard.dtype)
        with in_collective():
            dist.gather(padded, list(gathered.split(size)) if is_owner else None, dst=owner, group=self._cpu_group)
        return gathered if is_owner else None

    def broadcast_cpu(self, values: torch.Tensor | None, shape: torch.Size) -> torch.Tensor:
        """The float32 tensor of rank 0 on every rank, in host memory.

        Args:
            values: on rank 0.
            shape: of it.
        """
        received = torch.empty(shape, dtype=torch.float32) if values is None else values
        with in_collective():
            dist.broadcast(received, src=0, group=self._cpu_group)
        return received

    def barrier(self) -> None:
        """Wait for all ranks; a rank may take any time to come here."""
        with in_collective():
            dist.barrier(group=self._cpu_group)

    def close(self) -> None:
        """End the process group."""
        dist.destroy_process_group()


def init_process_group(timeout: timedelta | None = None, collective_timeout: timedelta | None = None) -> ProcessGroup:
    """Join the process group that the launcher's environment variables describe; alone without a launcher.

    Args:
        timeout: how long to wait for all ranks to start, and for each collective; None: DeepSpeed's default.
        collective_timeout: for each collective, where it differs from `timeout`.

    Raises:
        ConfigError: an environment variable is out of its range, or this node has no device for the rank.
        PreflightError: not all ranks started in time.
    """
    _set_default_environment()
    check_environment()
    _quiet_deepspeed()
    device = _set_device(int(os.environ["LOCAL_RANK"]))
    _avoid_compiled_collectives()
    options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    if not dist.is_initialized():
        import deepspeed

        backend = "nccl" if device.type == "cuda" else "gloo"
        with report_missing_ranks(timeout):
            deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, **options)
    info = RankInfo(dist.get_rank(), int(os.environ["LOCAL_RANK"]), dist.get_world_size(), device)
    # Ranks that start together meet within `timeout`; only what they wait for later may take any time.
    cpu_group = dist.new_group(backend="gloo", **options)
    set_group_timeout(cpu_group, LONG_TIMEOUT)
    process_group = ProcessGroup(info, cpu_group, timeout if collective_timeout is None else collective_timeout)
    process_group.limit_collectives()
    return process_group


def adopt_process_group(device: torch.device) -> ProcessGroup:
    """The process group that another trainer has made, whose environment and time-outs stay as they are; a collective.

    Args:
        device: of this rank.
    """
    if not dist.is_initialized():
        return ProcessGroup(RankInfo(0, 0, 1, device), None, None)
    info = RankInfo(dist.get_rank(), int(os.environ.get("LOCAL_RANK", dist.get_rank())), dist.get_world_size(), device)
    cpu_group = dist.new_group(backend="gloo")
    set_group_timeout(cpu_group, LONG_TIMEOUT)
    return ProcessGroup(info, cpu_group, None)


def _set_default_environment() -> None:
    """Complete RANK, WORLD_SIZE and LOCAL_RANK: srun sets its own names only, plain python none at all."""
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
        os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    # A free port keeps single-rank runs on one host apart; several ranks have to agree on a fixed one.
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port()) if os.environ["WORLD_SIZE"] == "1" else "29500"


def _quiet_deepspeed() -> None:
    """Silence warnings that no user can act on: an untested optimizer, and deprecated calls of DeepSpeed itself."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")


def _set_device(local_rank: int) -> torch.device:
    """Make this rank's GPU the current one; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    check_device(local_rank, torch.cuda.device_count())
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _avoid_compiled_collectives() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce on CPUs.

    The compilation is guarded by a lock file that a killed process leaves behind and every later start waits for; gloo
    needs neither compiler nor lock.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def seed_everything(seed: int) -> None:
    """Seed the generators behind dropout and random weights on this rank."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def hard_exit(exit_code: int) -> None:
    """Exit at once, without cleanup, if this process is in a process group; otherwise return.

    The threads of a group that not all ranks have closed may abort the process while it exits normally, and its exit
    code would be lost.
    """
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
