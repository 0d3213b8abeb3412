"""Soft masks on the shards of an engine: on the optimizer's update, or on the gradient before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import torch

from das_ds.config import SoftmaskConfig
from das_ds.distributed.state import Shard
from das_ds.engine.engine import Engine
from das_ds.functional.masks import MaskTable, SegmentTable, build_lookup_tables, fill_gaps
from das_ds.functional.units import UnitLayout, UnitValues
from das_ds.kernels.protection import LEVELS, Protection
from das_ds.softmask.direction_mask import DirectionMask
from das_ds.softmask.sharded_importance import ShardedImportance, apply_lookup


class SoftMasks:
    """Soft-masks all further steps of an engine by what it is given last, at whichever level that is.

    Args:
        engine: under which the optimizer runs.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._shards = engine.shards()
        self._device = engine.ranks.info.device
        self._by_unit: MaskTable | None = None

    def protect_units(self, layout: UnitLayout, importance: UnitValues, softmask: SoftmaskConfig) -> None:
        """By the importance of units, group -> (L, U)."""
        if self._by_unit is None:
            self._by_unit = self._install_table(layout, softmask)
        self._by_unit.load(importance)

    def protect_parameters(self, layout: UnitLayout, importance: ShardedImportance, softmask: SoftmaskConfig) -> None:
        """By the importance of every weight.

        Where the mask is not 1 - I itself it takes another byte per weight of the shards.
        """
        groups, shared_scale, strength = softmask.groups, softmask.unowned_update_scale, softmask.exponent
        tables = build_lookup_tables(
            layout.owners, groups=groups, shared_scale=shared_scale, strength=strength, num_levels=LEVELS
        )
        flats = importance.flats if tables is None else apply_lookup(self._shards, importance.flats, tables)
        if softmask.apply_to == "update":
            self._engine.protect({f: Protection(v.numel(), importance=v) for f, v in flats.items()})
        else:
            parts = [flats[s.flat][s.start : s.start + s.numel] for s in self._shards]
            self._engine.mask_gradients([Protection(part.numel(), importance=part) for part in parts])

    def protect_directions(
        self, widths: dict[str, int], mask_of: Callable[[str], torch.Tensor], sizes: dict[str, int]
    ) -> None:
        """Multiply the rows of updates of these parameters (o, d) by a matrix each, (d, d) float32.

        Takes another fp32 number per weight of the largest flat tensor while it is stepped.

        Args:
            widths: parameter -> d.
            mask_of: parameter -> its matrix; asked only where this rank steps some of the parameter.
            sizes: parameter -> number of its weights that are masked, whole rows from the first on.
        """
        flats = self._engine.flats_by_parameter()
        masked = [
            replace(shard, numel=min(shard.numel, sizes[shard.name] - shard.offset))
            for shard in self._shards
            if shard.name in widths and shard.offset < sizes[shard.name]
        ]
        # Those before are as large; both at once need not find room.
        self._engine.protect_rows(None)
        self._engine.protect_rows(DirectionMask(masked, flats, widths, mask_of, self._device))

    def _install_table(self, layout: UnitLayout, softmask: SoftmaskConfig) -> MaskTable:
        table = MaskTable(
            layout,
            readers=softmask.include_consumers,
            shared_scale=softmask.unowned_update_scale,
            groups=softmask.groups,
            strength=softmask.exponent,
            device=self._shards[0].flat.device if self._shards else self._device,
        )
        if softmask.apply_to == "update":
            by_flat: dict[torch.Tensor, list[Shard]] = {}
            for shard in self._shards:
                by_flat.setdefault(shard.flat, []).append(shard)
            self._engine.protect(
                {flat: _unit_protection(table, flat.numel(), parts) for flat, parts in by_flat.items()}
            )
        else:
            alone = [replace(shard, start=0) for shard in self._shards]
            self._engine.mask_gradients([_unit_protection(table, shard.numel, [shard]) for shard in alone])
        return table


def _unit_protection(table: MaskTable, numel: int, parts: list[Shard]) -> Protection:
    """Protection of a flat tensor of `numel` elements that shards lie in."""
    segments = chain.from_iterable(table.segments(s.name, start=s.start, offset=s.offset, numel=s.numel) for s in parts)
    return Protection(numel, table=SegmentTable(numel, fill_gaps(segments, numel), table.values))
