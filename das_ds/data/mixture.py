"""What the training of a stage reads: one domain, with earlier text where there is some, or several at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from das_ds.data.loader import SampleDataset
from das_ds.data.replay import NO_REPLAY, REPLAY_STREAM, Replay, SampleRef
from das_ds.functional.sampling import SampleOrder, replay_number


@dataclass(frozen=True)
class SingleDomain:
    """A domain's samples in their order; those that are replayed take the place of some in every global batch."""

    samples: SampleDataset
    global_batch_size: int
    replay: Replay = NO_REPLAY

    @cached_property
    def parts(self) -> tuple[SampleDataset, ...]:
        """The domain, then the corpora that are replayed."""
        seed, stream = self.samples.seed, self.samples.stream + REPLAY_STREAM
        return self.samples, *(SampleDataset(*source, seed, stream) for source in self.replay.sources)

    def ref(self, number: int) -> SampleRef:
        """Global sample `number`."""
        is_replayed, own = replay_number(number, self.global_batch_size, self.replay.num_sequences)
        if is_replayed:
            return self.replay.ref(own, self.samples.seed, self.samples.stream)
        return SampleRef(own, self._order[own])

    @cached_property
    def _order(self) -> SampleOrder:
        return _order(self.samples)


@dataclass(frozen=True)
class MixedDomains:
    """Several domains in turn: global sample k is sample k div n of domain k mod n, of n.

    Of any B rows in a row each domain has floor(B / n) or ceil(B / n), whichever batch, micro-batch or rank they are.
    Over as many steps as all domains would have one by one, each gives exactly the samples that it would give then,
    the corruption included.
    """

    parts: tuple[SampleDataset, ...]

    def ref(self, number: int) -> SampleRef:
        """Global sample `number`."""
        own, source = divmod(number, len(self.parts))
        return SampleRef(own, self._orders[source][own], source)

    @cached_property
    def _orders(self) -> list[SampleOrder]:
        return [_order(samples) for samples in self.parts]


def _order(samples: SampleDataset) -> SampleOrder:
    return SampleOrder(len(samples.blocks), samples.seed, samples.stream)
