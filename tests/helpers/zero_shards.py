"""Shards and weights as `zero.py` sees them, collected on real ranks."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from das_ds.config import RunConfig
from das_ds.data.batch import Batch
from das_ds.distributed.flag_sync import FlagSync
from das_ds.distributed.process_group import init_process_group
from das_ds.distributed.torch_internals import all_process_groups, group_timeout
from das_ds.errors import DataError
from helpers.tiny_models import NO_DROPOUT
from helpers.training import build, rank_part

ShardSlice = tuple[str, int, torch.Tensor]


def shards_and_restore(configs: list[RunConfig], batch: Batch) -> list[dict[str, Any]]:
    """Per config: this rank's shards, and whether training and restoring a snapshot gives back the first weights."""
    return [_shards_and_restore(config, batch) for config in configs]


def _shards_and_restore(config: RunConfig, batch: Batch) -> dict[str, Any]:
    ranks = init_process_group()
    engine = build(config, ranks, **NO_DROPOUT).engine
    part = rank_part(batch, ranks.info.rank, ranks.info.world_size)
    shards: list[ShardSlice] = [
        (shard.name, shard.param_start, shard.flat.detach().view(-1)[shard.span].clone())
        for shard in engine.weights.shards
    ]
    before = _weights(engine)
    output = _output(engine, part)
    snapshot = engine.weights.snapshot()
    engine.start_domain(4)
    for _ in range(2 * engine.accumulation_steps):
        _, losses = engine(part.corrupted_ids, part.predicted, part.targets)
        engine.backward(losses.mean())
        engine.step()
    moved = _weights(engine)
    moved_output = _output(engine, part)
    engine.weights.restore(snapshot)
    after = _weights(engine)
    after_output = _output(engine, part)
    engine.close()
    return {
        "shards": shards,
        "weights": before,
        "moved": any(not torch.equal(before[n], moved[n]) for n in before) and not torch.equal(output, moved_output),
        "restored": all(torch.equal(before[n], after[n]) for n in before) and torch.equal(output, after_output),
    }


def _weights(engine: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in engine.weights.fp32_weights()}


@torch.no_grad()
def _output(engine: Any, part: Batch) -> torch.Tensor:
    hidden: torch.Tensor = engine.module(part.input_ids, part.predicted, part.targets)[0]
    return hidden


def prepare_in_turn(folder: Path) -> tuple[int, float]:
    """Rank 0 prepares for longer than the time-out of ordinary collectives; the others start when it is done."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=2))
    ranks = init_process_group()

    def prepare() -> int:
        marker = folder / "prepared"
        if ranks.info.is_main:
            time.sleep(4)
            marker.touch()
        return int(marker.exists())

    started = time.monotonic()
    return ranks.main_process_first(prepare), time.monotonic() - started


def fail_on_one(failing_rank: int) -> str:
    """The error that every rank sees when one of them fails."""
    ranks = init_process_group()

    def prepare() -> int:
        if ranks.info.rank == failing_rank:
            raise DataError(f"found nothing on rank {failing_rank}")
        return 0

    try:
        ranks.main_process_first(prepare)
    except DataError as error:
        return str(error)
    return "no error"


def identity(value: int) -> int:
    """Nothing but a process group, to see that the environment is complete."""
    ranks = init_process_group()
    assert ranks.info.local_rank == int(os.environ["LOCAL_RANK"])
    return value + ranks.info.rank


def timeouts(config: RunConfig, timeout: timedelta, collective_timeout: timedelta) -> list[timedelta]:
    """Of every process group of a rank whose engine is built."""
    ranks = init_process_group(timeout, collective_timeout)
    FlagSync(ranks)
    engine = build(config, ranks, **NO_DROPOUT).engine
    found = [group_timeout(group) for group in all_process_groups()]
    engine.close()
    return found


def matmul_precision(config: RunConfig) -> str:
    """Of float32 matrix products once an engine is built."""
    build(config, init_process_group(), **NO_DROPOUT)
    return torch.get_float32_matmul_precision()
