"""Forms of the mask written out weight by weight, and the product's on real ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from das_ds.config import ImportanceConfig, RunConfig
from das_ds.data.batch import Batch
from das_ds.distributed.process_group import init_process_group
from das_ds.softmask.sharded_importance import ShardedImportance, zeros_by_flat
from helpers.parameter_importance import ShardValues, shard_values
from helpers.reference import full_masks, unit_ones
from helpers.tiny_models import tiny_model
from helpers.training import build, train_all

Weights = dict[str, Tensor]


def owners() -> dict[str, str]:
    """Parameter of the tiny model -> the group whose units own it, found by masking nothing but that group."""
    model = tiny_model()
    found = dict.fromkeys(dict(tiny_model().named_parameters()), "unowned")
    ones = unit_ones(model)
    for group in ones:
        only = {g: v if g == group else torch.zeros_like(v) for g, v in ones.items()}
        found.update({name: group for name, scale in full_masks(model, only).items() if not scale.any()})
    return found


def to_dense(importance: Weights, groups: list[str], exponent: float, unowned_update_scale: float) -> Weights:
    """1 - I' of every weight, (1 - I)^exponent where its owner is masked, in 255ths as I is."""
    scales = {}
    for name, owner in owners().items():
        kept = (
            (1 - importance[name].double() / 255) ** exponent if owner in groups else torch.ones_like(importance[name])
        )
        scale = kept * (unowned_update_scale if owner == "unowned" else 1.0)
        scales[name] = 1 - ((1 - scale) * 255).round() / 255
    return scales


def magnitudes(seed: int = 0) -> Weights:
    """Parameter of the tiny model -> (N,) float32, heavy-tailed; some are 0, and small ones are often equal."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for number, (name, weight) in enumerate(tiny_model().named_parameters()):
        values = torch.randn(weight.numel(), generator=generator) ** 4
        drawn[name] = values.mul(100).round().div(100) * 10.0 ** (number % 5 - 2)
    return drawn


def normalized_and_trained(
    normalizing: RunConfig,
    forms: list[ImportanceConfig],
    training: list[RunConfig],
    steps: list[list[Batch]],
    model_changes: dict[str, Any],
) -> tuple[list[ShardValues], list[Any]]:
    """Per form, this rank's shards of `magnitudes` normalized; and what `train_all` gives."""
    ranks = init_process_group()
    run = build(normalizing, ranks)
    shards = run.engine.weights.named_shards
    sums = zeros_by_flat(shards.values(), torch.float32)
    drawn = magnitudes()
    for name, shard in shards.items():
        part = drawn[name][shard.param_span]
        sums[shard.flat][shard.span] = part
    sizes = run.layout.sizes
    device = ranks.info.device
    layout = run.layout
    made = [ShardedImportance.from_magnitudes(shards, sizes, device, sums, layout.owners, form) for form in forms]
    found = [shard_values(run, importance.flats) for importance in made]
    run.engine.close()
    return found, train_all(training, steps, model_changes)
