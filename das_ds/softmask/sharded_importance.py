"""Sharded parameter importance: one byte per weight, next to the optimizer's shards.

Shape legend: F elements of a flat tensor of the optimizer, N elements of a complete parameter, n of a chunk, K owners.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch

from das_ds.config import ImportanceConfig
from das_ds.distributed.collectives import all_reduce_max, all_reduce_sum
from das_ds.distributed.state import Shard, zeros_by_flat
from das_ds.functional.units import Ownership, UnitLayout, UnitValues
from das_ds.kernels.protection import NUM_LEVELS
from das_ds.softmask.sharded_normalize import CHUNK_ELEMENTS, Comparison, quantize


class ShardedImportance:
    """I of every weight of a model, in [0, 1] and quantized to 255ths; each rank has that of its shards.

    Args:
        shards: this rank's shards, at most one per parameter; those of all ranks cover every parameter, at stage 0 each
            rank has all.
        sizes: name -> N of every parameter, in the same order on every rank; elements after N have importance 0.
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
        # Cut off at N: rows of tokens that no text had yet.
        self._shards = {
            name: replace(shard, numel=min(shard.numel, sizes[name] - shard.param_start))
            for name, shard in shards.items()
            if shard.param_start < sizes[name]
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
        """Normalize and quantize over all ranks; a collective.

        `abs_tanh` within each tensor is the form of SPG (Konishi et al., Parameter-Level Soft-Masking for Continual
        Learning, ICML 2023, section 3: tanh of the gradient standardized per layer); the others are described in
        `functional.importance`. None of them changes when `sums` are multiplied by a constant.

        Args:
            shards, sizes, device: as for the class.
            sums: flat tensor -> (F,) float32, not negative: the values to normalize.
            owners: name -> group whose units own the parameter, of which `settings.scope` makes comparisons.
            settings: form, its parameters, and scope.
        """
        result = cls(shards, sizes, device)
        magnitudes = {name: sums[shard.flat][shard.span] for name, shard in result._shards.items()}
        comparison = Comparison.by_scope(settings.scope, owners, sizes)
        for name, levels in quantize(magnitudes, comparison, settings, device):
            result._crop(result._shards[name]).copy_(levels)
        return result

    def elementwise_maximum(self, other: ShardedImportance | None) -> ShardedImportance:
        """EMax (Ke et al. 2023, eq. 3), element by element in the shard; order-free, idempotent."""
        if other is None:
            return self
        flats = {flat: torch.maximum(values, other.flats[flat]) for flat, values in self.flats.items()}
        return ShardedImportance(self._shards, self._sizes, self._device, flats)

    def mean_by_unit(self, layout: UnitLayout) -> UnitValues:
        """Mean importance of the weights each unit owns, group -> (L, U) float32, equal on every rank; a collective.

        Weights that only consume a unit do not count. Where all weights of a unit have one importance, the mean equals
        it. A unit that owns no trained weight (one without adapter under LoRA) gets 1, as it has not changed.
        """
        totals = {group: values.double() for group, values in layout.zeros(self._device).items()}
        counts = {group: values.double() for group, values in layout.zeros(self._device).items()}
        for item in layout.ownerships:
            if not item.consumer and item.parameter in self._shards:
                self._add_owned(item, layout, totals[item.group][item.layer], counts[item.group][item.layer])
        return {
            group: _mean_or_one(all_reduce_sum(totals[group]), all_reduce_sum(counts[group])).float()
            for group in totals
        }

    def _add_owned(self, item: Ownership, layout: UnitLayout, total: torch.Tensor, count: torch.Tensor) -> None:
        """Add to each unit's sum of importance and number of weights, (U,) float64, those of this rank's shard."""
        shard = self._shards[item.parameter]
        _, num_rows, num_columns = layout.shapes[item.parameter]
        # (A, K): the owners of every entry of the axis.
        owners = item.units.to(self._device)
        position = shard.param_start
        for chunk in self._crop(shard).split(CHUNK_ELEMENTS):
            values = chunk.to(self._device).double() / NUM_LEVELS
            # (n,): elements of the flattened parameter, then the entries of the axis that they lie at.
            index = position + torch.arange(chunk.numel(), device=self._device)
            if item.axis == 0:
                entry = index // num_columns
            else:
                entry = index // (num_rows * num_columns) * num_columns + index % num_columns
            for unit in owners[entry].unbind(dim=1):
                # Rows of owners are filled up with -1.
                owned = unit >= 0
                total.index_add_(0, unit[owned], values[owned])
                count.index_add_(0, unit[owned], torch.ones_like(values[owned]))
            position += chunk.numel()

    def gather(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, (N,) uint8) of every parameter in turn, on every rank; a collective per parameter."""
        for name, numel in self._sizes.items():
            complete = torch.zeros(numel, dtype=torch.uint8, device=self._device)
            shard = self._shards.get(name)
            if shard is not None:
                complete[shard.param_span] = self._crop(shard)
            # The others have 0 where this rank has its shard.
            yield name, all_reduce_max(complete)

    def fill(self, read: Callable[[str, int, int], torch.Tensor]) -> None:
        """Set every shard from `read(name, offset, numel) -> (numel,) uint8`, on any number of ranks."""
        for name, shard in self._shards.items():
            self._crop(shard).copy_(read(name, shard.param_start, shard.numel))

    def _crop(self, shard: Shard) -> torch.Tensor:
        """View of a shard's levels."""
        return self.flats[shard.flat][shard.span]


def apply_lookup(
    shards: Iterable[Shard], flats: dict[torch.Tensor, torch.Tensor], tables: dict[str, torch.Tensor]
) -> dict[torch.Tensor, torch.Tensor]:
    """Flat tensor -> (F,) uint8, every level l of `flats` replaced by `tables[parameter][l]`.

    Args:
        shards: of which levels are replaced; everything else gets 0.
        flats: flat tensor -> (F,) uint8.
        tables: parameter -> (256,) uint8.
    """
    shards = list(shards)
    replaced = zeros_by_flat(shards, torch.uint8)
    for shard in shards:
        table = tables[shard.name].to(shard.flat.device)
        old_levels = flats[shard.flat][shard.span]
        new_levels = replaced[shard.flat][shard.span]
        # Chunk by chunk: an index takes 8 bytes per weight.
        for old, new in zip(old_levels.split(CHUNK_ELEMENTS), new_levels.split(CHUNK_ELEMENTS), strict=True):
            new.copy_(table[old.long()])
    return replaced


def _mean_or_one(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    return torch.where(count > 0, total / count.clamp_min(1), 1.0)
