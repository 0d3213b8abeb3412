"""Importance -> masks of an engine: on the optimizer's update, or on the gradient before it.

Shape legend: F elements of a flat tensor of the optimizer, L layers, U units, d columns of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Literal, Protocol, TypeVar

import torch

from das_ds.config import SoftmaskConfig
from das_ds.distributed.state import Shard
from das_ds.engine.engine import Engine
from das_ds.engine.mask import ElementwiseMask, ElementwiseMasks, UpdateMasks
from das_ds.functional.masks import MaskTable, SegmentTable, build_lookup_tables, fill_gaps
from das_ds.functional.units import UnitLayout, UnitValues
from das_ds.kernels.protection import NUM_LEVELS, Protection
from das_ds.softmask.direction_mask import build_direction_masks
from das_ds.softmask.sharded_importance import ShardedImportance, apply_lookup

Settings = TypeVar("Settings", contravariant=True)


class Maskable(Protocol[Settings]):
    """What `apply_masks` needs of an `Importance`."""

    def masks(self, settings: Settings) -> UpdateMasks:
        """Masks of the engine's flat tensors."""


def apply_masks(
    engine: Engine,
    importance: Maskable[Settings],
    settings: Settings,
    *,
    apply_to: Literal["update", "gradient"] = "update",
) -> None:
    """Soft-mask all further steps of an engine by an importance, and by nothing else.

    Args:
        engine: whose steps are masked.
        importance: source of the masks.
        settings: from which, with importance, they are made.
        apply_to: `gradient` needs element-wise masks of all flat tensors.
    """
    # Earlier masks may be as large as the new ones: both need not fit in memory.
    engine.set_masks({})
    engine.set_gradient_masks({})
    masks = importance.masks(settings)
    if apply_to == "update":
        engine.set_masks(masks)
        return
    elementwise = {flat: mask for flat, mask in masks.items() if isinstance(mask, ElementwiseMask)}
    assert len(elementwise) == len(masks), "gradients are masked element by element"
    engine.set_gradient_masks(elementwise)


def unit_masks(
    engine: Engine, layout: UnitLayout, importance: UnitValues, softmask: SoftmaskConfig
) -> ElementwiseMasks:
    """Masks by the importance of units, group -> (L, U): tables of segments, whose size does not grow with F."""
    shards = engine.weights.shards
    table = MaskTable(
        layout,
        include_consumers=softmask.include_consumers,
        unowned_update_scale=softmask.unowned_update_scale,
        groups=softmask.groups,
        exponent=softmask.exponent,
        device=shards[0].flat.device if shards else engine.ranks.info.device,
    )
    table.load(importance)
    by_flat: dict[torch.Tensor, list[Shard]] = {}
    for shard in shards:
        by_flat.setdefault(shard.flat, []).append(shard)
    return {flat: ElementwiseMask(_unit_protection(table, flat.numel(), in_flat)) for flat, in_flat in by_flat.items()}


def parameter_masks(
    engine: Engine, layout: UnitLayout, importance: ShardedImportance, softmask: SoftmaskConfig
) -> ElementwiseMasks:
    """Masks by the importance of every weight.

    Where the mask is not 1 - I itself it takes another byte per weight of the shards.
    """
    tables = build_lookup_tables(
        layout.owners,
        groups=softmask.groups,
        unowned_update_scale=softmask.unowned_update_scale,
        exponent=softmask.exponent,
        num_levels=NUM_LEVELS,
    )
    flats = importance.flats
    if tables is not None:
        flats = apply_lookup(engine.weights.shards, flats, tables)
    return {flat: ElementwiseMask(Protection(len(levels), importance=levels)) for flat, levels in flats.items()}


def direction_masks(
    engine: Engine, widths: dict[str, int], projector: Callable[[str], torch.Tensor], sizes: dict[str, int]
) -> UpdateMasks:
    """Masks that multiply the rows of updates of these parameters (o, d) by a matrix each, (d, d) float32.

    They take another fp32 number per weight of the largest flat tensor while it is stepped.

    Args:
        engine: whose updates are masked.
        widths: parameter -> d.
        projector: parameter -> its matrix; called only for parameters that this rank has a shard of.
        sizes: parameter -> number of its weights that are masked, full rows from the first on.
    """
    masked = [
        replace(shard, numel=min(shard.numel, sizes[shard.name] - shard.param_start))
        for shard in engine.weights.shards
        if shard.name in widths and shard.param_start < sizes[shard.name]
    ]
    flats = engine.weights.flats_by_parameter()
    return build_direction_masks(masked, flats, widths, projector, engine.ranks.info.device)


def _unit_protection(table: MaskTable, numel: int, shards: list[Shard]) -> Protection:
    """Protection of a flat tensor of `numel` elements that the shards lie in."""
    segments = chain.from_iterable(
        table.segments(shard.name, start=shard.flat_start, offset=shard.param_start, numel=shard.numel)
        for shard in shards
    )
    return Protection(numel, table=SegmentTable(numel, fill_gaps(segments, numel), table.values))
