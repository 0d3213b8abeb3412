"""One rank of many in one process: torch's `fake` backend does nothing in collectives, and everything else is real.

Numbers that other ranks would send are missing, so values mean nothing; shapes, shards, bytes and memory do.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed.runtime.zero.partition_parameters
import deepspeed.runtime.zero.partitioned_param_coordinator
import deepspeed.runtime.zero.stage3
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from das_ds.config import RunConfig
from das_ds.context import DomainContext
from das_ds.distributed.process_group import ProcessGroup, init_process_group
from das_ds.distributed.resumable import ResumableLoop
from das_ds.engine.zero import full_numel, full_shape
from das_ds.methods import build_method
from das_ds.methods.directions import Directions
from das_ds.tracking.tracker import Tracker
from das_ds.training.domain_trainer import DomainTrainer
from helpers.fake_directions import protect_directions, tell_what_ranks_project
from helpers.run_ranks import run_ranks
from helpers.training import build, random_batch

CHECKED_MODULES = (
    deepspeed.runtime.zero.stage3,
    deepspeed.runtime.zero.partition_parameters,
    deepspeed.runtime.zero.partitioned_param_coordinator,
)
"""Where ZeRO-3 compares values with rank 0, whose broadcast nobody sends here."""
KINDS = {
    "c10d.allreduce_.default": ("all_reduce", 0),
    "c10d.allgather_.default": ("all_gather", 0),
    "c10d._allgather_base_.default": ("all_gather", 0),
    "c10d._reduce_scatter_base_.default": ("reduce_scatter", 1),
    "c10d.alltoall_base_.default": ("all_to_all", 1),
}
"""Operation -> (kind of collective, argument that holds the complete tensors, or what a rank sends)."""


@dataclass(frozen=True)
class Observation:
    """What one rank has and does; `sizes` in the order in which DeepSpeed sees the parameters."""

    sizes: dict[str, tuple[int, bool]]
    """Name -> elements, and whether it is a matrix."""
    shards: list[tuple[str, int, int]]
    """(name, first element, elements) of this rank."""
    collectives: dict[str, int]
    """Kind -> bytes in one step that is not the first."""
    held: int
    """Bytes of all tensors between steps."""
    peak: int
    """Largest number of bytes of all tensors during the step."""


def observe(config: RunConfig, rank: int, world_size: int, **model_changes: Any) -> Observation:
    """Build the product's engine as one rank, and train two steps of the run's method; in a process of its own."""
    return run_ranks(_observe, 1, config, rank, world_size, model_changes)[0]


def _observe(config: RunConfig, rank: int, world_size: int, model_changes: dict[str, Any]) -> Observation:
    with _fake_group(rank, world_size) as ranks:
        run = build(config, ranks, **model_changes)
        if config.method.name == "osft":
            tell_what_ranks_project(run.engine, world_size)
        method = build_method(run)
        domain = _domain(Path(config.output_dir))
        if isinstance(method, Directions):
            protect_directions(method, world_size)
        method.before_domain(domain)
        run.engine.start_domain(3)
        method.on_train_start(domain)
        trainer = DomainTrainer(run.engine, method, Tracker([]), config.train)
        run.engine.module.train()
        batches = [random_batch(config.train.micro_batch_size, i) for i in range(run.engine.accumulation_steps)]
        for step in (1, 2):
            trainer.train_step(step, batches, measure_norm=False)
        gc.collect()
        held = sum(storage.nbytes() for storage in _live_storages())
        with _Recorder(rank) as recorder:
            trainer.train_step(3, batches, measure_norm=False)
        return Observation(
            sizes={n: (full_numel(p), len(full_shape(p)) > 1) for n, p in run.engine.parameters.items()},
            shards=[(shard.name, shard.param_start, shard.numel) for shard in run.engine.weights.shards],
            collectives=dict(recorder.collectives),
            held=held,
            peak=held + recorder.peak,
        )


def _domain(folder: Path) -> DomainContext:
    """A domain whose sample is one batch."""
    batch = random_batch(2, 0)
    return DomainContext(
        0,
        "domain",
        lambda label: ResumableLoop([batch]),
        lambda label: ResumableLoop([[batch]]),
        folder,
        folder / "domain",
    )


@contextmanager
def _fake_group(rank: int, world_size: int) -> Iterator[ProcessGroup]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    make_group = dist.new_group
    for module in CHECKED_MODULES:
        module.assert_ints_same_as_other_ranks = lambda ints: None
    with (
        patch.object(dist, "new_group", lambda *args, **options: make_group(*args, **{**options, "backend": "fake"})),
        patch.object(ProcessGroup, "all_gather_object", lambda self, value: [value] * world_size),
        # What other ranks would send is zero, and not what happens to be in memory, such as NaN.
        patch.object(torch, "empty", _zeroed(torch.empty)),
    ):
        yield init_process_group()


def _zeroed(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make_zeros(*args: Any, **options: Any) -> torch.Tensor:
        tensor = make(*args, **options)
        tensor.detach().zero_()
        return tensor

    return make_zeros


@dataclass
class _Recorder(TorchDispatchMode):
    """Counts bytes of collectives, and of tensors that are made while it is active."""

    rank: int
    collectives: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    _present: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._seen = {id(storage) for storage in _live_storages()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d."):
            kind, argument = KINDS.get(name, (name, 0))
            self.collectives[kind] += sum(t.nbytes for t in tree_leaves(args[argument]) if torch.is_tensor(t))
            if kind == "all_to_all":
                # What the rank keeps; the values are bytes.
                self.collectives[kind] -= args[4][self.rank]
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if torch.is_tensor(tensor):
                self._add(tensor.untyped_storage())
        return results

    def _add(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._seen:
            return
        self._seen.add(id(storage))
        num_bytes = storage.nbytes()
        self._present += num_bytes
        self.peak = max(self.peak, self._present)
        weakref.finalize(storage, self._remove, id(storage), num_bytes)

    def _remove(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self._present -= num_bytes


def _live_storages() -> list[torch.UntypedStorage]:
    """Storages of all tensors that Python knows, each once."""
    found: dict[int, torch.UntypedStorage] = {}
    for value in gc.get_objects():
        # Not `isinstance`, which wakes deprecated objects.
        if issubclass(type(value), torch.Tensor) and value.device.type == "cpu":
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage
    return [storage for pointer, storage in found.items() if pointer]
