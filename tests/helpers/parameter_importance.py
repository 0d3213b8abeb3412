"""Parameter-level importance of the product on real ranks, for comparison with brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from das_ds.config import RunConfig
from das_ds.context import DomainContext
from das_ds.data.batch import Batch
from das_ds.distributed.process_group import init_process_group
from das_ds.distributed.resumable import ResumableLoop
from das_ds.functional.units import UnitValues
from das_ds.methods.das import DAS
from das_ds.models.architectures.registry import spec_for
from das_ds.softmask.importance_file import save_parameter_importance
from das_ds.softmask.parameter import ParameterImportance, sum_over_gradients
from helpers.importance import LOSSES, NoisePerBatch
from helpers.reference import fix_noise
from helpers.tiny_models import tiny_model
from helpers.training import LENGTH, build, rank_part

ShardValues = list[tuple[str, int, Tensor]]


def measured_all(
    configs: list[RunConfig], kind: str, steps: list[list[Batch]], changes: dict[str, Any]
) -> list[tuple[ShardValues, ShardValues, UnitValues]]:
    """Per config: this rank's shards of the sums over gradients and of the importance, and its means by unit."""
    return [_measured(config, kind, steps, changes) for config in configs]


def _measured(
    config: RunConfig, kind: str, steps: list[list[Batch]], changes: dict[str, Any]
) -> tuple[ShardValues, ShardValues, UnitValues]:
    ranks = init_process_group()
    run = build(config, ranks, **changes)
    info = ranks.info
    engine = run.engine
    before = {name: weight.clone() for name, weight in engine.weights.fp32_weights()}
    if kind == "proxy":
        batches = [batch for step in steps for batch in step]
        num_sequences = sum(len(batch.input_ids) for batch in batches)
        fix_noise(engine.module.model, 2 * num_sequences, LENGTH)  # type: ignore[arg-type]
        NoisePerBatch(engine.module, batches, num_sequences, info.rank, info.world_size)
    parts = [[rank_part(batch, info.rank, info.world_size) for batch in step] for step in steps]
    steps = ResumableLoop(parts)
    folder = config.output_dir
    domain = DomainContext(0, "domain", lambda label: ResumableLoop([]), lambda label: steps, folder, folder)
    settings = DAS.settings_in(config).importance
    importance = ParameterImportance.measure(run, domain, "", LOSSES[kind], settings)
    assert all(torch.equal(before[name], weight) for name, weight in engine.weights.fp32_weights())
    assert engine.module.training
    # The pass is complete: its sums are given back without any batch.
    sums = sum_over_gradients(run, steps, LOSSES[kind], settings.score)
    found = shard_values(run, sums), shard_values(run, importance.sharded.flats), importance.unit_gates()
    engine.close()
    return found


def shard_values(run: Any, flats: dict[Tensor, Tensor]) -> ShardValues:
    """(name, first element, elements) of this rank's shards of flat tensors."""
    return [(s.name, s.param_start, flats[s.flat][s.span].clone()) for s in run.engine.weights.shards]


def joined(ranks: list[ShardValues], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Full tensors from the shards of all ranks; elements that no rank has stay NaN."""
    full = {name: torch.full((shape.numel(),), torch.nan, dtype=torch.float64) for name, shape in shapes.items()}
    for shards in ranks:
        for name, offset, part in shards:
            full[name][offset : offset + part.numel()] = part.double()
    return {name: values.view(shapes[name]) for name, values in full.items()}


def random_weights_importance(seed: int = 0) -> dict[str, Tensor]:
    """Name -> uint8 importance of every weight of the tiny model, with 0 and 255 among them."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, weight in tiny_model().named_parameters():
        drawn[name] = torch.randint(0, 256, weight.shape, generator=generator, dtype=torch.uint8)
        drawn[name].view(-1)[:2] = torch.tensor([0, 255], dtype=torch.uint8)
    return drawn


def save_random_weights_importance(folder: Path) -> Path:
    """A file of `random_weights_importance`, as a run would have written it."""
    layout = spec_for("roberta").layout(tiny_model())
    path = folder / "importance.safetensors"
    save_parameter_importance(path, {n: v.flatten() for n, v in random_weights_importance().items()}, layout)
    return path


def read_and_write(config: RunConfig, source: Path, target: Path) -> UnitValues:
    """Reads importance on these ranks and writes it again."""
    ranks = init_process_group()
    run = build(config, ranks)
    importance = ParameterImportance.load(run, source)
    # A second reading, accumulated: EMax with itself changes nothing.
    ParameterImportance.load(run, source).accumulate(importance).save(target, run.tokens)
    found = importance.unit_gates()
    run.engine.close()
    return found
