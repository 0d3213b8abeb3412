"""Sharded normalization: importance of all parameters at once, gathering nothing but statistics.

Shape legend: n elements of this rank's shard of a parameter, C comparisons (sets of parameters whose entries are
compared with each other), Q thresholds of a comparison, K cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from das_ds.config import ImportanceConfig
from das_ds.distributed.collectives import all_reduce_max, all_reduce_sum
from das_ds.functional.importance import RANK_FORMS, histogram, normalize_by_value
from das_ds.kernels.protection import NUM_LEVELS

CHUNK_ELEMENTS = 1 << 24
"""Elements whose values or indices, 8 bytes each, exist at a time."""
FLOAT_BITS = 31
"""Of a float32 that is not negative: integers of these bits are in the order of the values."""
CUT_BITS = 12
"""Binary logarithm of the number of cuts below which entries are counted at a time, for each comparison."""

Magnitudes = dict[str, torch.Tensor]
"""Parameter -> (n,) float32, not negative: this rank's shard of the values to normalize."""
ToLevel = Callable[[torch.Tensor, int], torch.Tensor]
"""(chunk of a shard, index of its comparison) -> importance in 255ths."""


@dataclass(frozen=True)
class Comparison:
    """Which parameters' entries are compared with each other; the same on every rank."""

    indices: dict[str, int]
    """Every parameter -> its comparison, 0 .. C - 1."""
    num_entries: tuple[int, ...]
    """Entries of each comparison over all ranks, (C,)."""

    @classmethod
    def by_scope(cls, scope: str, owners: dict[str, str], sizes: dict[str, int]) -> Comparison:
        """One comparison for each parameter (`tensor`), each group of owners (`group`), or one for all (`model`).

        Args:
            scope: `importance.scope`.
            owners: parameter -> the group whose units own it.
            sizes: parameter -> its number of entries.
        """
        key_by_scope: dict[str, Callable[[str], str]] = {
            "tensor": lambda name: name,
            "group": lambda name: owners[name],
            "model": lambda name: "",
        }
        keys = {name: key_by_scope[scope](name) for name in sizes}
        totals: dict[str, int] = {}
        for name, size in sizes.items():
            totals[keys[name]] = totals.get(keys[name], 0) + size
        indices = {key: index for index, key in enumerate(totals)}
        return cls({name: indices[key] for name, key in keys.items()}, tuple(totals.values()))


def quantize(
    magnitudes: Magnitudes, comparison: Comparison, settings: ImportanceConfig, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """(parameter, (n,) uint8 importance in 255ths) of this rank's shards in turn; a collective.

    Args:
        magnitudes: the values to normalize; together the ranks have every entry, each on the same number of ranks.
        comparison: which entries are compared.
        settings: form and its parameters.
        device: where collectives run.
    """
    is_by_rank = settings.normalization in RANK_FORMS
    build = _build_level_by_rank if is_by_rank else _build_level_by_value
    to_level = build(magnitudes, comparison, settings, device)
    for name, shard in magnitudes.items():
        levels = torch.empty(shard.numel(), dtype=torch.uint8, device=shard.device)
        for target, chunk in zip(levels.split(CHUNK_ELEMENTS), shard.split(CHUNK_ELEMENTS), strict=True):
            target.copy_(to_level(chunk, comparison.indices[name]))
        yield name, levels


def _build_level_by_value(
    magnitudes: Magnitudes, comparison: Comparison, settings: ImportanceConfig, device: torch.device
) -> ToLevel:
    statistics = _compute_statistics(magnitudes, comparison, device)

    def to_level(chunk: torch.Tensor, index: int) -> torch.Tensor:
        mean, std, largest = statistics[index].to(chunk.device)
        importance = normalize_by_value(chunk.double(), mean, std, largest, settings)
        return (importance * NUM_LEVELS).round_()

    return to_level


def _build_level_by_rank(
    magnitudes: Magnitudes, comparison: Comparison, settings: ImportanceConfig, device: torch.device
) -> ToLevel:
    # (C, Q): how many entries must be less for an entry to reach each level.
    counts = torch.stack([histogram(size, settings, NUM_LEVELS) for size in comparison.num_entries]).to(device)
    thresholds = find_quantile_thresholds(magnitudes, comparison, counts, device).int()
    # One threshold for each level, or a single one between 0 and 1.
    step = NUM_LEVELS // counts.shape[1]

    def to_level(chunk: torch.Tensor, index: int) -> torch.Tensor:
        # Compared as integers: floats that are not negative have the same order.
        return torch.bucketize(chunk.view(torch.int32), thresholds[index].to(chunk.device), right=True) * step

    return to_level


def _compute_statistics(magnitudes: Magnitudes, comparison: Comparison, device: torch.device) -> torch.Tensor:
    """(C, 3) float64: mean, population standard deviation and maximum of each comparison; a collective."""
    num_comparisons = len(comparison.num_entries)
    count, sums, largest, squares = torch.zeros(4, num_comparisons, dtype=torch.float64, device=device)
    for name, shard in magnitudes.items():
        index = comparison.indices[name]
        count[index] += shard.numel()
        sums[index] += shard.sum(dtype=torch.float64).to(device)
        largest[index] = torch.maximum(largest[index], shard.amax().double().to(device))
    # Counts include every copy of an entry (all ranks have all at stage 0), as the sums do.
    all_reduce_sum(count)
    mean = all_reduce_sum(sums) / count
    # A second pass around the mean: sums of squares alone would cancel.
    for name, shard in magnitudes.items():
        index = comparison.indices[name]
        center = mean[index].to(shard.device)
        for chunk in shard.split(CHUNK_ELEMENTS):
            squares[index] += (chunk.double() - center).square_().sum().to(device)
    std = (all_reduce_sum(squares) / count).sqrt()
    return torch.stack((mean, std, all_reduce_max(largest)), dim=1)


def find_quantile_thresholds(
    magnitudes: Magnitudes, comparison: Comparison, counts: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """Bits of the smallest float32 that at least `counts` entries of its comparison are less than; a collective.

    Exact, without sorting or gathering: a search over the bits. Each threshold is kept between two integers; every
    round cuts the interval into equal parts, and all ranks count the entries below the cuts, for all parameters at
    once: 8 rounds for 255 thresholds of each comparison, 3 for one.

    Args:
        magnitudes, comparison: as for `quantize`.
        counts: (C, Q) int64, not falling along Q, between 0 and the comparison's number of entries.
        device: where collectives run.

    Returns:
        (C, Q) int64, not falling along Q; 0 where the count is 0.
    """
    counts = counts * _count_copies(magnitudes, comparison, device)[:, None]
    # As many bits per round as give about 2^CUT_BITS cuts for all Q thresholds.
    bits_per_round = CUT_BITS - (counts.shape[1] - 1).bit_length()
    # (C, Q): fewer than `counts` entries lie below this, and not fewer below this plus 2^width.
    below = torch.zeros_like(counts)
    width = FLOAT_BITS
    while width > 0:
        next_width = max(width - bits_per_round, 0)
        steps = torch.arange(1, 1 << (width - next_width), device=device) << next_width
        # (C, Q, cuts of one interval).
        cuts = below[:, :, None] + steps
        num_less = _count_less(magnitudes, comparison, cuts.flatten(1), device).view_as(cuts)
        num_cuts_below = (num_less < counts[:, :, None]).sum(dim=2)
        below = below + (num_cuts_below << next_width)
        width = next_width
    return torch.where(counts > 0, below + 1, 0)


def _count_less(
    magnitudes: Magnitudes, comparison: Comparison, cuts: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """(C, K): entries of all ranks whose bits are less than each of the cuts (C, K)."""
    num_cuts = cuts.shape[1]
    sorted_cuts, order = cuts.sort(dim=1)
    # (C, K + 1): entries between neighboring cuts, below the first and above the last.
    between = torch.zeros(len(cuts), num_cuts + 1, dtype=torch.int64, device=device)
    for name, shard in magnitudes.items():
        index = comparison.indices[name]
        edges = sorted_cuts[index].int().to(shard.device)
        for chunk in shard.view(torch.int32).split(CHUNK_ELEMENTS):
            bins = torch.bucketize(chunk, edges, right=True)
            between[index] += torch.bincount(bins, minlength=num_cuts + 1).to(device)
    num_less = all_reduce_sum(between).cumsum(dim=1)[:, :-1]
    # Back to the order in which the cuts came.
    return torch.empty_like(cuts).scatter_(1, order, num_less)


def _count_copies(magnitudes: Magnitudes, comparison: Comparison, device: torch.device) -> torch.Tensor:
    """(C,): on how many ranks each entry is, one or, at ZeRO stage 0, all; a collective."""
    stored = torch.zeros(len(comparison.num_entries), dtype=torch.int64, device=device)
    for name, shard in magnitudes.items():
        stored[comparison.indices[name]] += shard.numel()
    return all_reduce_sum(stored) // torch.tensor(comparison.num_entries, device=device)
