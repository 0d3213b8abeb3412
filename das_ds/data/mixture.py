"""Sample streams of a training stage: one domain, with replay of earlier corpora, or a mixture of several domains.

A domain may be a mixture itself: then its blocks come from several sources, in the proportions of their weights. A
source may be a stream: then its samples are shuffled window by window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from das_ds.data.blocks import Blocks, MixedBlocks
from das_ds.data.loader import SampleDataset
from das_ds.data.replay import NO_REPLAY, REPLAY_STREAM, Replay, SampleRef
from das_ds.data.stream_blocks import StreamBlocks
from das_ds.data.stream_windows import TokenStream
from das_ds.data.token_blocks import TokenBlocks
from das_ds.functional.round_robin import WeightedRoundRobin
from das_ds.functional.sampling import SampleOrder, replay_number


@dataclass(frozen=True)
class SingleDomain:
    """The samples of one domain, shuffled per epoch; replayed samples replace some of them in every global batch."""

    samples: SampleDataset
    global_batch_size: int
    replay: Replay = NO_REPLAY

    @cached_property
    def datasets(self) -> tuple[SampleDataset, ...]:
        """The domain, then the replayed corpora."""
        seed = self.samples.seed
        stream = self.samples.stream + REPLAY_STREAM
        return self.samples, *(SampleDataset(*source, seed, stream) for source in self.replay.sources)

    def ref(self, number: int) -> SampleRef:
        """Global sample `number`."""
        # The number among the replayed samples, or among the domain's own.
        is_replayed, source_number = replay_number(number, self.global_batch_size, self.replay.num_sequences)
        if is_replayed:
            return self.replay.ref(source_number, self.samples.seed, self.samples.stream)
        return SampleRef(source_number, self._order[source_number])

    def windows(self, number: int) -> Iterator[tuple[TokenStream, int]]:
        """Streams of the domain, and the window that the first sample from `number` on is in."""
        is_replayed, source_number = replay_number(number, self.global_batch_size, self.replay.num_sequences)
        return _windows(self.samples.blocks, number - source_number if is_replayed else source_number)

    @cached_property
    def _order(self) -> Order:
        return _sample_order(self.samples)


@dataclass(frozen=True)
class MixedDomains:
    """Weighted round robin over n domains: global sample k is sample m of domain i, where (i, m) is turn k.

    Of any B consecutive rows, in whatever batch, micro-batch or rank, each domain has its part of B, with equal weights
    up to one sample (`functional.round_robin`). With as many steps and weights in the proportions of training on the
    domains one by one, each contributes exactly the samples that it would contribute then, including their corruption.
    """

    datasets: tuple[SampleDataset, ...]
    weights: tuple[int, ...] = ()
    """Parts of the samples that each domain has; empty: equal parts."""

    def ref(self, number: int) -> SampleRef:
        """Global sample `number`."""
        source, source_number = self._turns[number]
        return SampleRef(source_number, self._orders[source][source_number], source)

    def windows(self, number: int) -> Iterator[tuple[TokenStream, int]]:
        """Streams of the domains, and the window that the first sample from `number` on is in."""
        for samples, count in zip(self.datasets, self._turns.counts(number), strict=True):
            yield from _windows(samples.blocks, count)

    @cached_property
    def _turns(self) -> WeightedRoundRobin:
        return WeightedRoundRobin(self.weights or (1,) * len(self.datasets))

    @cached_property
    def _orders(self) -> list[Order]:
        return [_sample_order(samples) for samples in self.datasets]


class MixtureOrder:
    """Block of every sample of a mixture: its source takes turns, and is shuffled for each of its own epochs.

    Args:
        blocks: of all sources.
        seed: seed of the run.
        stream: name of the use.
    """

    def __init__(self, blocks: MixedBlocks, seed: int, stream: str) -> None:
        self._blocks = blocks
        self._orders = [
            _part_order(part, seed, f"{stream}/{name}") for name, part in zip(blocks.names, blocks.parts, strict=True)
        ]

    def __getitem__(self, number: int) -> int:
        source, source_number = self._blocks.turns[number]
        return self._blocks.starts[source] + self._orders[source][source_number]


class StreamOrder:
    """Block of every sample of a stream: its windows one after the other, the blocks of each in an order of its own.

    With W blocks in a window, sample k is block w W + order_w[k mod W] of window w = k div W. A window is made when the
    first of its samples is asked for, so that errors of its text are raised there and not in a loader worker.

    Args:
        blocks: of the stream.
        seed: seed of the run.
        stream: name of the use.
    """

    def __init__(self, blocks: StreamBlocks, seed: int, stream: str) -> None:
        self._blocks = blocks
        # The order of a window is that of an epoch of as many blocks.
        self._order = SampleOrder(blocks.window_size, seed, stream)
        self._window = -1

    def __getitem__(self, number: int) -> int:
        window = number // self._blocks.window_size
        if window != self._window:
            self._blocks.require(window)
            self._window = window
        return window * self._blocks.window_size + self._order[number]


Order = SampleOrder | MixtureOrder | StreamOrder
"""Sample number -> block."""


def _sample_order(samples: SampleDataset) -> Order:
    blocks = samples.blocks
    if isinstance(blocks, MixedBlocks):
        return MixtureOrder(blocks, samples.seed, samples.stream)
    return _part_order(blocks, samples.seed, samples.stream)


def _part_order(blocks: TokenBlocks | StreamBlocks, seed: int, stream: str) -> SampleOrder | StreamOrder:
    if isinstance(blocks, StreamBlocks):
        return StreamOrder(blocks, seed, stream)
    return SampleOrder(len(blocks), seed, stream)


def _windows(blocks: Blocks, number: int) -> Iterator[tuple[TokenStream, int]]:
    """Streams that blocks come from, and the window of the first sample of each from sample `number` on."""
    counts = blocks.turns.counts(number) if isinstance(blocks, MixedBlocks) else [number]
    for part, count in zip(blocks.parts, counts, strict=True):
        if isinstance(part, StreamBlocks):
            yield part.stream, count // part.window_size
