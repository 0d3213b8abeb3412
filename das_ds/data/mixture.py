"""Sample streams of a training stage: one domain, with replay of earlier corpora, or a mixture of several domains.

A domain may be a mixture itself: then its blocks come from several sources, in the proportions of their weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from das_ds.data.blocks import MixedBlocks
from das_ds.data.loader import SampleDataset
from das_ds.data.replay import NO_REPLAY, REPLAY_STREAM, Replay, SampleRef
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

    @cached_property
    def _order(self) -> SampleOrder | MixtureOrder:
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

    @cached_property
    def _turns(self) -> WeightedRoundRobin:
        return WeightedRoundRobin(self.weights or (1,) * len(self.datasets))

    @cached_property
    def _orders(self) -> list[SampleOrder | MixtureOrder]:
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
            SampleOrder(len(part), seed, f"{stream}/{name}")
            for name, part in zip(blocks.names, blocks.parts, strict=True)
        ]

    def __getitem__(self, number: int) -> int:
        source, source_number = self._blocks.turns[number]
        return self._blocks.starts[source] + self._orders[source][source_number]


def _sample_order(samples: SampleDataset) -> SampleOrder | MixtureOrder:
    blocks = samples.blocks
    if isinstance(blocks, MixedBlocks):
        return MixtureOrder(blocks, samples.seed, samples.stream)
    return SampleOrder(len(blocks), samples.seed, samples.stream)
