"""Moments of inputs measured, saved, read and turned into projectors on real ranks."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from das_ds.config import RunConfig
from das_ds.context import CorpusSample, RunContext
from das_ds.data.batch import Batch
from das_ds.distributed.process_group import ProcessGroup, init_process_group
from das_ds.distributed.resumable import ResumableLoop
from das_ds.functional import projectors
from das_ds.functional.directions import build_projector, direction_projector
from das_ds.functional.projectors import DenseProjector
from das_ds.softmask import input_moments
from das_ds.softmask.direction import DirectionImportance
from das_ds.softmask.input_layout import InputLayout, build_input_layout
from das_ds.softmask.linear_inputs import find_masked_matrices
from das_ds.softmask.projector_exchange import share_projector
from das_ds.training.train import train
from helpers.half import allow_fp16_on_cpu
from helpers.resume import BrokenOffError, Place, _breaking_run
from helpers.tiny_models import NO_DROPOUT
from helpers.training import build, rank_part, run_config

SATURATION = 0.5


@dataclass(frozen=True)
class RankMoments:
    """What one rank holds."""

    inputs: InputLayout
    moments: dict[str, torch.Tensor]
    """Of the inputs that it owns."""
    projectors: dict[str, torch.Tensor]
    """Of the inputs that it steps a matrix of."""
    stepped: set[str]
    """Inputs of which it has a shard of a matrix, by the engine's own list."""


def moments_config(folder: Path, world_size: int, stage: int, num_rows: int) -> RunConfig:
    """A run over rows that divide by the number of ranks."""
    return run_config(
        folder,
        train={
            **run_config(folder).train.model_dump(),
            "micro_batch_size": num_rows // world_size,
            "global_batch_size": num_rows,
        },
        deepspeed={"zero_optimization": {"stage": stage}},
        method={"name": "directions", "half_saturation": SATURATION},
    )


def hold_moments(config: RunConfig, batches: list[Batch], budget: int, path: Path | None = None) -> RankMoments:
    """Measure joined batches in passes of so many bytes of sums, or read a file; save a file where there is none."""
    ranks = init_process_group()
    input_moments.SUMS_BYTES = budget
    run = build(config, ranks, **NO_DROPOUT)
    inputs = build_input_layout(find_masked_matrices(run), run.engine.weights.shards, ranks)
    if path is not None and path.exists():
        importance = DirectionImportance.load(run, inputs, path)
    else:
        importance = _measure(run, inputs, [rank_part(b, ranks.info.rank, ranks.info.world_size) for b in batches])
        if path is not None:
            importance.save(path, ())
    held = dict(importance.projectors(lambda moment: DenseProjector(direction_projector(moment, SATURATION))))
    names = {shard.name for shard in run.engine.weights.shards}
    result = RankMoments(
        inputs,
        importance.moments,
        {name: projector.matrix for name, projector in held.items() if isinstance(projector, DenseProjector)},
        {matrix.input for matrix in inputs.matrices if matrix.parameter in names},
    )
    run.engine.close()
    return result


def _measure(run: RunContext, inputs: InputLayout, batches: list[Batch]) -> DirectionImportance:
    importance = DirectionImportance(run, inputs, {}, None)
    importance.measure(CorpusSample("inputs", lambda label, **_: ResumableLoop(batches), None))
    return importance


@dataclass(frozen=True)
class Shrink:
    """A projector of another form: s x, with a vector that is not used."""

    vector: torch.Tensor
    factor: float


def share_shrink(owner: int, users: tuple[int, ...]) -> tuple[torch.Tensor, float] | None:
    """What this rank gets of a projector in bf16 with a number."""
    ranks = init_process_group()
    projectors.Shrink = Shrink  # type: ignore[attr-defined]
    own: Any = None
    if ranks.info.rank == owner:
        own = Shrink(torch.arange(6, dtype=torch.bfloat16).view(3, 2).T, 0.25)
    found: Any = share_projector(own, owner, users, ranks.info.device)
    # Rank 0 has the store by which others still connect, and may have nothing to send.
    ranks.barrier()
    return None if found is None else (found.vector, found.factor)


def project_with_shared(owner: int, moment: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """The product of vectors (n, d) with the projector of a moment that one rank computes for all."""
    ranks = init_process_group()
    own = build_projector(moment, SATURATION, "full") if ranks.info.rank == owner else None
    everyone = tuple(range(ranks.info.world_size))
    shared = share_projector(own, owner, everyone, ranks.info.device)
    assert shared is not None
    return shared.project(vectors)


def run_in_passes(values: list[dict[str, Any]], budget: int) -> None:
    """Complete runs whose sums of moments take so many bytes at a time."""
    ranks = _start(budget)
    for each in values:
        train(RunConfig(**each), ranks)


def break_off_measuring(values: dict[str, Any], budget: int, domain: int, check: int) -> Place:
    """Interrupt a run at the `check`-th save point after a domain's steps; the first that saves is number 1."""
    ranks = _start(budget)
    breaks: list[Place] = []
    passed = 0

    def is_there(run: Any) -> bool:
        nonlocal passed
        passed += run.phase == "after" and run.domains_done == domain
        # The first is that of entering the phase.
        return passed == check + 1

    with suppress(BrokenOffError):
        _breaking_run(RunConfig(**values), ranks, is_there, breaks)
    return breaks[0]


def _start(budget: int) -> ProcessGroup:
    allow_fp16_on_cpu()
    input_moments.SUMS_BYTES = budget
    return init_process_group()
