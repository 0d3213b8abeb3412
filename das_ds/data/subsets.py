"""Fixed subsets of the blocks of a corpus, in the proportions of its sources if it is a mixture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from das_ds.data.blocks import Blocks
from das_ds.data.stream_blocks import StreamBlocks
from das_ds.data.token_blocks import TokenBlocks
from das_ds.functional.sampling import subset_indices


def random_subset(blocks: Blocks, num_samples: int, seed: int) -> list[int]:
    """Sorted indices of min(num_samples, all) different blocks, in the proportions of a mixture while they last."""
    return _by_part(blocks, num_samples, lambda part, count: subset_indices(len(part), count, seed))


def first_blocks(blocks: Blocks, num_blocks: int | None) -> Sequence[int]:
    """Indices of the first so many blocks, in the proportions of a mixture while they last; None: all of them."""
    if num_blocks is None or num_blocks >= len(blocks):
        return range(len(blocks))
    return _by_part(blocks, num_blocks, lambda _, count: range(count))


def _by_part(
    blocks: Blocks, num_blocks: int, choose: Callable[[TokenBlocks | StreamBlocks, int], Sequence[int]]
) -> list[int]:
    chosen: list[int] = []
    start = 0
    for part, count in zip(blocks.parts, blocks.spread(num_blocks), strict=True):
        chosen += [start + index for index in choose(part, count)]
        start += part.extent
    return chosen
