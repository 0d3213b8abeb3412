"""Sample streams of a training stage: one domain, with replay of earlier corpora, or a mixture of several domains."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from das_ds.data.loader import SampleDataset
from das_ds.data.replay import NO_REPLAY, REPLAY_STREAM, Replay, SampleRef
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
    def _order(self) -> SampleOrder:
        return _sample_order(self.samples)


@dataclass(frozen=True)
class MixedDomains:
    """Round robin over n domains: global sample k is sample floor(k / n) of domain k mod n.

    Of any B consecutive rows, in whatever batch, micro-batch or rank, each domain has floor(B / n) or ceil(B / n). Over
    as many steps as training on the domains one by one takes, each contributes exactly the samples that it would
    contribute then, including their corruption.
    """

    datasets: tuple[SampleDataset, ...]

    def ref(self, number: int) -> SampleRef:
        """Global sample `number`."""
        source_number, source = divmod(number, len(self.datasets))
        return SampleRef(source_number, self._orders[source][source_number], source)

    @cached_property
    def _orders(self) -> list[SampleOrder]:
        return [_sample_order(samples) for samples in self.datasets]


def _sample_order(samples: SampleDataset) -> SampleOrder:
    return SampleOrder(len(samples.blocks), samples.seed, samples.stream)
