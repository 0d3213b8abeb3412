"""Earlier weights in the place of present ones, and method kd, as real ranks see them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from das_ds.config import RunConfig
from das_ds.data.batch import Batch
from das_ds.distributed.process_group import init_process_group
from das_ds.engine.engine import Engine
from das_ds.engine.weight_snapshot import WeightSnapshot
from helpers.training import build, rank_part, train_all


@dataclass(frozen=True)
class TeacherFacts:
    """What one rank found."""

    is_exact: bool
    """In every step earlier weights gave the very output of their time; present ones gave another."""
    is_exact_after_loading: bool
    """So did what was loaded from a state, and loading moved no present weight."""
    is_undisturbed: bool
    """With dropout, training with them ends bit for bit where training without them ends."""
    knows_both_orders: bool
    """ZeRO-3 gathers ahead in passes with either weights."""
    num_elements: int
    """Numbers that this rank keeps."""


def teach_and_train(
    with_teacher: list[RunConfig], trained: list[RunConfig], steps: list[list[Batch]], no_dropout: dict[str, float]
) -> tuple[list[TeacherFacts], list[Any]]:
    """Facts of earlier weights per config of `with_teacher`, and what `train_all` gives for those of `trained`."""
    return [_facts(config, steps) for config in with_teacher], train_all(trained, steps, no_dropout)


def _facts(config: RunConfig, steps: list[list[Batch]]) -> TeacherFacts:
    ranks = init_process_group()
    info = ranks.info
    parts = [[rank_part(batch, info.rank, info.world_size) for batch in step] for step in steps]
    engine = build(config, ranks).engine
    expected = _output(engine, parts[0][0])
    earlier = engine.weights.weight_snapshot()
    outputs = _train(engine, parts, earlier)
    knows_both = _knows_both_orders(engine, earlier)
    moved = _output(engine, parts[0][0])
    trained = engine.weights.snapshot()
    loaded = engine.weights.weight_snapshot(earlier.flats())
    exact_after_loading = torch.equal(_output(engine, parts[0][0], loaded), expected)
    unmoved = torch.equal(_output(engine, parts[0][0]), moved)
    unmoved = unmoved and all(map(torch.equal, engine.weights.snapshot(), trained))
    num_elements = sum(values.numel() for values in earlier._earlier)
    engine.close()
    alone = build(config, ranks).engine
    _train(alone, parts, None)
    is_undisturbed = all(map(torch.equal, alone.weights.snapshot(), trained))
    alone.close()
    return TeacherFacts(
        is_exact=all(torch.equal(output, expected) for output in outputs) and not torch.equal(moved, expected),
        is_exact_after_loading=exact_after_loading and unmoved,
        is_undisturbed=is_undisturbed,
        knows_both_orders=knows_both,
        num_elements=num_elements,
    )


def _train(engine: Engine, parts: list[list[Batch]], earlier: WeightSnapshot | None) -> list[torch.Tensor]:
    """Outputs of earlier weights, one for every micro-step."""
    torch.manual_seed(0)
    engine.start_domain(len(parts))
    outputs = []
    for step in parts:
        for _ in engine.retry_on_overflow():
            for batch in step:
                if earlier is not None:
                    outputs.append(_output(engine, parts[0][0], earlier))
                _, losses = engine(batch.corrupted_ids, batch.predicted, batch.targets)
                engine.backward(losses.sum())
                engine.step()
    return outputs


@torch.no_grad()
def _output(engine: Engine, batch: Batch, earlier: WeightSnapshot | None = None) -> torch.Tensor:
    engine.module.eval()
    with nullcontext() if earlier is None else earlier.swapped_in():
        hidden, losses = engine.module(batch.corrupted_ids, batch.predicted, batch.targets)
    engine.module.train()
    return torch.cat((hidden.float().flatten(), losses))


def _knows_both_orders(engine: Engine, earlier: WeightSnapshot) -> bool:
    if earlier._swap is None:
        return True
    present = engine._engine.optimizer.parameter_offload.param_coordinator
    return present.is_complete_trace() and earlier._swap._coordinator.is_complete_trace()
