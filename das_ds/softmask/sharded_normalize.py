"""Normalising magnitudes that lie in shards, of all parameters at once: nothing is gathered but statistics.

Shape legend: n elements of this rank's stretch of a parameter, C comparisons (sets of parameters whose entries are
compared with each other), Q thresholds of a comparison, K cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from das_ds.config import ImportanceConfig
from das_ds.distributed.collectives import all_reduce_max, all_reduce_sum
from das_ds.functional.importance import RANK_FORMS, by_value, histogram
from das_ds.kernels.protection import LEVELS

CHUNK_ELEMENTS = 1 << 24
"""Elements whose values or places, 8 bytes each, exist at a time."""
FLOAT_BITS = 31
"""Of a float32 that is not negative: in their order as integers they are in the order of the numbers."""
CUT_BITS = 12
"""Binary logarithm of the number of cuts below which entries are counted at a time, for each comparison."""

Parts = dict[str, torch.Tensor]
"""Parameter -> (n,) float32, not negative: this rank's stretch of it."""
Level = Callable[[torch.Tensor, int], torch.Tensor]
"""(elements of a stretch, their comparison) -> their importance in 255ths."""


@dataclass(frozen=True)
class Comparison:
    """Which parameters' entries are compared with each other; the same on every rank."""

    number_of: dict[str, int]
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
        key_of = {"tensor": lambda name: name, "group": lambda name: owners[name], "model": lambda name: ""}[scope]
        totals: dict[str, int] = {}
        for name, size in sizes.items():
            totals[key_of(name)] = totals.get(key_of(name), 0) + size
        numbers = {key: number for number, key in enumerate(totals)}
        return cls({name: numbers[key_of(name)] for name in sizes}, tuple(totals.values()))


def quantize(
    parts: Parts, comparison: Comparison, settings: ImportanceConfig, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """(parameter, (n,) uint8 importance in 255ths) of this rank's stretches in turn; a collective.

    Args:
        parts: what is normalised; all ranks' together are every entry, each on equally many ranks.
        comparison: what is compared with what.
        settings: form and its parameters.
        device: where collectives run.
    """
    make = _make_level_by_rank if settings.normalization in RANK_FORMS else _make_level_by_value
    level = make(parts, comparison, settings, device)
    for name, part in parts.items():
        levels = torch.empty(part.numel(), dtype=torch.uint8, device=part.device)
        for into, chunk in zip(levels.split(CHUNK_ELEMENTS), part.split(CHUNK_ELEMENTS), strict=True):
            into.copy_(level(chunk, comparison.number_of[name]))
        yield name, levels


def _make_level_by_value(
    parts: Parts, comparison: Comparison, settings: ImportanceConfig, device: torch.device
) -> Level:
    statistics = _statistics(parts, comparison, device)

    def level(chunk: torch.Tensor, number: int) -> torch.Tensor:
        mean, std, largest = statistics[number].to(chunk.device)
        return (by_value(chunk.double(), mean, std, largest, settings) * LEVELS).round_()

    return level


def _make_level_by_rank(
    parts: Parts, comparison: Comparison, settings: ImportanceConfig, device: torch.device
) -> Level:
    counts = torch.stack([histogram(size, settings, LEVELS) for size in comparison.num_entries]).to(device)
    thresholds = find_quantile_thresholds(parts, comparison, counts, device).int()
    # One threshold for each level, or a single one between nothing and all.
    step = LEVELS // counts.shape[1]

    def level(chunk: torch.Tensor, number: int) -> torch.Tensor:
        return torch.bucketize(chunk.view(torch.int32), thresholds[number].to(chunk.device), right=True) * step

    return level


def _statistics(parts: Parts, comparison: Comparison, device: torch.device) -> torch.Tensor:
    """(C, 3) float64: mean, population standard deviation and maximum of each comparison; a collective."""
    num, number_of = len(comparison.num_entries), comparison.number_of
    sums, largest, squares = (torch.zeros(num, dtype=torch.float64, device=device) for _ in range(3))
    count = torch.zeros(num, dtype=torch.float64, device=device)
    for name, part in parts.items():
        number = number_of[name]
        count[number] += part.numel()
        sums[number] += part.sum(dtype=torch.float64).to(device)
        largest[number] = torch.maximum(largest[number], part.amax().double().to(device))
    all_reduce_sum(count)
    mean = all_reduce_sum(sums) / count
    for name, part in parts.items():
        number = number_of[name]
        center = mean[number].to(part.device)
        for chunk in part.split(CHUNK_ELEMENTS):
            squares[number] += (chunk.double() - center).square_().sum().to(device)
    std = (all_reduce_sum(squares) / count).sqrt()
    return torch.stack((mean, std, all_reduce_max(largest)), dim=1)


def find_quantile_thresholds(
    parts: Parts, comparison: Comparison, counts: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """Bits of the smallest float32 that at least `counts` entries of its comparison are less than; a collective.

    Exact, without sorting or gathering. What is looked for is kept between two integers. In every round the stretch
    between them is cut into equal pieces, and all ranks count the entries below the cuts, for all parameters together:
    8 rounds for 255 thresholds of each comparison, 3 for one.

    Args:
        parts, comparison: as for `quantize`.
        counts: (C, Q) int64, not falling along Q, between 0 and the comparison's number of entries.
        device: where collectives run.

    Returns:
        (C, Q) int64, not falling along Q; 0 where the count is 0.
    """
    counts = counts * _copies(parts, comparison, device)[:, None]
    bits = CUT_BITS - (counts.shape[1] - 1).bit_length()
    # Fewer than `counts` entries lie below this, and not fewer below this plus 2^width.
    below, width = torch.zeros_like(counts), FLOAT_BITS
    while width > 0:
        piece = max(width - bits, 0)
        cuts = below[:, :, None] + (torch.arange(1, 1 << (width - piece), device=device) << piece)
        num_less = _num_less(parts, comparison, cuts.flatten(1), device).view_as(cuts)
        below, width = below + ((num_less < counts[:, :, None]).sum(dim=2) << piece), piece
    return torch.where(counts > 0, below + 1, 0)


def _num_less(parts: Parts, comparison: Comparison, cuts: torch.Tensor, device: torch.device) -> torch.Tensor:
    """(C, K): entries of all ranks whose bits are less than each of the cuts (C, K)."""
    num_cuts = cuts.shape[1]
    in_order, places_of = cuts.sort(dim=1)
    between = torch.zeros(len(cuts), num_cuts + 1, dtype=torch.int64, device=device)
    for name, part in parts.items():
        number = comparison.number_of[name]
        edges = in_order[number].int().to(part.device)
        for chunk in part.view(torch.int32).split(CHUNK_ELEMENTS):
            places = torch.bucketize(chunk, edges, right=True)
            between[number] += torch.bincount(places, minlength=num_cuts + 1).to(device)
    num_less = all_reduce_sum(between).cumsum(dim=1)[:, :-1]
    return torch.empty_like(cuts).scatter_(1, places_of, num_less)


def _copies(parts: Parts, comparison: Comparison, device: torch.device) -> torch.Tensor:
    """(C,) on how many ranks each entry is: one, or all at ZeRO stage 0; a collective."""
    held = torch.zeros(len(comparison.num_entries), dtype=torch.int64, device=device)
    for name, part in parts.items():
        held[comparison.number_of[name]] += part.numel()
    return all_reduce_sum(held) // torch.tensor(comparison.num_entries, device=device)
