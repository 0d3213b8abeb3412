"""Where soft masks act on the shards of an engine: on the optimizer's update, or on the gradient before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import torch
from deepspeed import DeepSpeedEngine
from torch import nn

from das_ds.config import SoftmaskConfig
from das_ds.distributed.gradient_mask import GradientMask
from das_ds.distributed.optimizer import ProtectedOptimizer
from das_ds.distributed.row_masks import RowMasks
from das_ds.distributed.sharded_importance import ShardedImportance, looked_up
from das_ds.distributed.zero import Shard, flats_by_parameter
from das_ds.functional.masks import MaskTable, mask_levels
from das_ds.functional.segments import SegmentTable, cover
from das_ds.functional.units import Importance, UnitLayout
from das_ds.kernels.protection import LEVELS, Protection


class SoftMasks:
    """Soft-masks all further steps of an engine by what it is given last, at whichever level that is.

    Args:
        engine: under which the optimizer runs.
        optimizer: masks its own update.
        shards: this rank's.
        parameters: name -> parameter of everything that is trained.
        device: where collectives run.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        optimizer: ProtectedOptimizer,
        shards: list[Shard],
        parameters: dict[str, nn.Parameter],
        device: torch.device,
    ) -> None:
        self._engine, self._optimizer, self._shards = engine, optimizer, shards
        self._parameters, self._device = parameters, device
        self._by_unit: MaskTable | None = None
        self._of_gradients: GradientMask | None = None

    def protect_units(self, layout: UnitLayout, importance: Importance, softmask: SoftmaskConfig) -> None:
        """By the importance of units, group -> (L, U)."""
        if self._by_unit is None:
            self._by_unit = self._install_table(layout, softmask)
        self._by_unit.load(importance)

    def protect_parameters(self, layout: UnitLayout, importance: ShardedImportance, softmask: SoftmaskConfig) -> None:
        """By the importance of every weight.

        Where the mask is not 1 - I itself it takes another byte per weight of the shards.
        """
        groups, shared_scale, strength = softmask.groups, softmask.shared_scale, softmask.strength
        tables = mask_levels(
            layout.owners, groups=groups, shared_scale=shared_scale, strength=strength, num_levels=LEVELS
        )
        flats = importance.flats if tables is None else looked_up(self._shards, importance.flats, tables)
        if softmask.apply_to == "update":
            self._optimizer.protect({f: Protection(v.numel(), importance=v) for f, v in flats.items()})
        else:
            parts = [flats[s.flat][s.start : s.start + s.numel] for s in self._shards]
            self._mask_gradients([Protection(part.numel(), importance=part) for part in parts])

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
        names = {parameter: name for name, parameter in self._parameters.items()}
        flats = flats_by_parameter(self._engine, names)
        masked = [
            replace(shard, numel=min(shard.numel, sizes[shard.name] - shard.offset))
            for shard in self._shards
            if shard.name in widths and shard.offset < sizes[shard.name]
        ]
        # Those before are as large; both at once need not find room.
        self._optimizer.protect_rows(None)
        self._optimizer.protect_rows(RowMasks(masked, flats, widths, mask_of, self._device))

    def mask_gradients(self) -> None:
        """To be called between the last backward pass and the step; nothing where updates are masked."""
        if self._of_gradients is not None:
            self._of_gradients.apply()

    def _install_table(self, layout: UnitLayout, softmask: SoftmaskConfig) -> MaskTable:
        table = MaskTable(
            layout,
            readers=softmask.readers,
            shared_scale=softmask.shared_scale,
            groups=softmask.groups,
            strength=softmask.strength,
            device=self._shards[0].flat.device if self._shards else self._device,
        )
        if softmask.apply_to == "update":
            by_flat: dict[torch.Tensor, list[Shard]] = {}
            for shard in self._shards:
                by_flat.setdefault(shard.flat, []).append(shard)
            self._optimizer.protect(
                {flat: _unit_protection(table, flat.numel(), parts) for flat, parts in by_flat.items()}
            )
        else:
            alone = [replace(shard, start=0) for shard in self._shards]
            self._mask_gradients([_unit_protection(table, shard.numel, [shard]) for shard in alone])
        return table

    def _mask_gradients(self, protections: list[Protection]) -> None:
        self._of_gradients = GradientMask(self._engine, self._shards, self._parameters, protections)


def _unit_protection(table: MaskTable, numel: int, parts: list[Shard]) -> Protection:
    """Protection of a flat tensor of `numel` elements that shards lie in."""
    segments = chain.from_iterable(table.segments(s.name, start=s.start, offset=s.offset, numel=s.numel) for s in parts)
    return Protection(numel, table=SegmentTable(numel, cover(segments, numel), table.values))
