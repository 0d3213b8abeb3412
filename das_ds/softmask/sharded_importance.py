"""Parameter-level importance that lives as ZeRO lives: one byte per weight, next to the optimizer's shards.

Shape legend: F elements of a flat tensor of the optimizer, N elements of a whole parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch

from das_ds.config import ImportanceConfig
from das_ds.distributed.collectives import all_reduce_max, all_reduce_sum
from das_ds.distributed.state import Shard, zeros_by_flat
from das_ds.functional.units import UnitLayout, UnitValues
from das_ds.kernels.protection import LEVELS
from das_ds.softmask.sharded_normalize import CHUNK_ELEMENTS, Comparison, quantize


class ShardedImportance:
    """I of every weight of a model, in [0, 1] and quantised to 255ths, each rank holding its shards' part.

    Args:
        shards: this rank's shards, at most one per parameter; all ranks' together cover every parameter, at stage 0
            each rank has all.
        sizes: name -> N of every parameter, in the same order on every rank; what lies behind N has importance 0.
        device: where collectives run.
        flats: importance by flat tensor, (F,) uint8; None: 0 everywhere.
    """

    def __init__(
        self,
        shards: dict[str, Shard],
        sizes: dict[str, int],
        device: torch.device,
        flats: dict[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self._shards = {
            name: replace(shard, numel=min(shard.numel, sizes[name] - shard.offset))
            for name, shard in shards.items()
            if shard.offset < sizes[name]
        }
        self._sizes = sizes
        self._device = device
        self.flats = zeros_by_flat(shards.values(), torch.uint8) if flats is None else flats

    @classmethod
    def from_magnitudes(
        cls,
        shards: dict[str, Shard],
        sizes: dict[str, int],
        device: torch.device,
        sums: dict[torch.Tensor, torch.Tensor],
        owners: dict[str, str],
        settings: ImportanceConfig,
    ) -> ShardedImportance:
        """Normalise and quantise over all ranks; a collective.

        `abs_tanh` within each tensor is the form of SPG (Konishi et al., Parameter-Level Soft-Masking for Continual
        Learning, ICML 2023, section 3: tanh of the gradient standardised per layer); the others are described in
        `functional.importance`. None of them changes when `sums` are multiplied by a constant.

        Args:
            shards, sizes, device: as for the class.
            sums: flat tensor -> (F,) float32, what is normalised, not negative.
            owners: name -> group whose units own the parameter, of which `settings.scope` makes comparisons.
            settings: form, its parameters, and scope.
        """
        result = cls(shards, sizes, device)
        parts = {name: _stretch(sums, shard) for name, shard in result._shards.items()}
        comparison = Comparison.within(settings.scope, owners, sizes)
        for name, levels in quantize(parts, comparison, settings, device):
            _stretch(result.flats, result._shards[name]).copy_(levels)
        return result

    def maximum(self, other: ShardedImportance | None) -> ShardedImportance:
        """EMax (Ke et al. 2023, eq. 3), element by element in the shard; order-free, idempotent."""
        if other is None:
            return self
        flats = {flat: torch.maximum(values, other.flats[flat]) for flat, values in self.flats.items()}
        return ShardedImportance(self._shards, self._sizes, self._device, flats)

    def by_unit(self, layout: UnitLayout) -> UnitValues:
        """Mean importance of the weights each unit owns, group -> (L, U) float32, equal on every rank; a collective.

        Weights that only read a unit do not count. Where all weights of a unit have one importance, this is it. A unit
        that owns no trained weight (one without adapter under LoRA) gets 1: all it is was there before.
        """
        total = {g: v.double() for g, v in layout.zeros(self._device).items()}
        count = {g: v.double() for g, v in layout.zeros(self._device).items()}
        for item in layout.ownerships:
            if item.consumer or item.parameter not in self._shards:
                continue
            shard = self._shards[item.parameter]
            _, num_rows, num_columns = layout.shapes[item.parameter]
            owners = item.units.to(self._device)
            for first, part in enumerate(_stretch(self.flats, shard).split(CHUNK_ELEMENTS)):
                values = part.to(self._device).double() / LEVELS
                index = shard.offset + first * CHUNK_ELEMENTS + torch.arange(part.numel(), device=self._device)
                if item.axis == 0:
                    along = index // num_columns
                else:
                    along = index // (num_rows * num_columns) * num_columns + index % num_columns
                for unit in owners[along].unbind(dim=1):
                    owned = unit >= 0
                    total[item.group][item.layer].index_add_(0, unit[owned], values[owned])
                    count[item.group][item.layer].index_add_(0, unit[owned], torch.ones_like(values[owned]))
        return {g: _mean_or_one(all_reduce_sum(total[g]), all_reduce_sum(count[g])).float() for g in total}

    def whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, (N,) uint8) of every parameter in turn, on every rank; a collective per parameter."""
        for name, numel in self._sizes.items():
            full = torch.zeros(numel, dtype=torch.uint8, device=self._device)
            if (shard := self._shards.get(name)) is not None:
                full[shard.offset : shard.offset + shard.numel] = _stretch(self.flats, shard)
            yield name, all_reduce_max(full)

    def fill(self, read: Callable[[str, int, int], torch.Tensor]) -> None:
        """Set every shard from `read(name, offset, numel) -> (numel,) uint8`, on any number of ranks."""
        for name, shard in self._shards.items():
            _stretch(self.flats, shard).copy_(read(name, shard.offset, shard.numel))


def apply_lookup(
    shards: Iterable[Shard], flats: dict[torch.Tensor, torch.Tensor], tables: dict[str, torch.Tensor]
) -> dict[torch.Tensor, torch.Tensor]:
    """Flat tensor -> (F,) uint8, every level l of `flats` replaced by `tables[parameter][l]`.

    Args:
        shards: what is replaced; everything else gets 0.
        flats: flat tensor -> (F,) uint8.
        tables: parameter -> (256,) uint8.
    """
    shards = list(shards)
    replaced = zeros_by_flat(shards, torch.uint8)
    for shard in shards:
        table = tables[shard.name].to(shard.flat.device)
        pairs = zip(*(_stretch(values, shard).split(CHUNK_ELEMENTS) for values in (replaced, flats)), strict=True)
        for new, old in pairs:
            new.copy_(table[old.long()])
    return replaced


def _mean_or_one(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    return torch.where(count > 0, total / count.clamp_min(1), 1.0)


def _stretch(flats: dict[torch.Tensor, torch.Tensor], shard: Shard) -> torch.Tensor:
    return flats[shard.flat][shard.start : shard.start + shard.numel]
