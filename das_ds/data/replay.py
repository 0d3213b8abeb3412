"""Earlier text in the batches of a domain: which rows it takes, and how rows of several corpora become one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from das_ds.data.batch import Batch
from das_ds.data.blocks import TokenBlocks
from das_ds.data.objectives import Collator
from das_ds.functional.sampling import sample_generator

REPLAY_STREAM = "/replay"
"""Ending of the stream of what is replayed in another stream."""


class SampleRef(NamedTuple):
    """One row of a batch."""

    number: int
    """Sample number in its stream, which fixes corruption: the domain's own, or that of everything replayed."""
    block: int
    """Index of its block."""
    source: int = 0
    """Position of its corpus among those that are read; of a domain with replay: 0, then i + 1 for corpus i of that."""


class RowSource(Protocol):
    """Makes batches of one corpus; never looks at the source."""

    def __getitems__(self, refs: Sequence[SampleRef]) -> Batch:
        """The batch of the given samples."""


@dataclass(frozen=True)
class Replay:
    """What is replayed in each global batch of a domain."""

    num_sequences: int = 0
    """Sequences of each global batch."""
    sources: tuple[tuple[TokenBlocks, Collator], ...] = ()
    """Blocks of each corpus, and what its rows predict under its own tokenizer."""

    def ref(self, number: int, seed: int, stream: str) -> SampleRef:
        """Replayed sample number i of a stream: the corpora come in turn, so that none is drowned by a larger one.

        Blocks are drawn with replacement, because few of many are replayed and an order of all of them would have to be
        kept for each corpus.
        """
        source = number % len(self.sources)
        generator = sample_generator(seed, f"{stream}{REPLAY_STREAM}/choice", number)
        return SampleRef(number, int(generator.integers(len(self.sources[source][0]))), source + 1)


NO_REPLAY = Replay()


@dataclass(frozen=True)
class MixedRows(Dataset[Batch]):
    """Batches with rows of several corpora, each made by its own; runs in the loader's processes."""

    parts: tuple[RowSource, ...]
    """By source."""

    def __getitems__(self, refs: Sequence[SampleRef]) -> Batch:
        """The batch of the given samples, which the loader asks for by this name."""
        rows = [
            (part, [row for row, ref in enumerate(refs) if ref.source == source])
            for source, part in enumerate(self.parts)
        ]
        found = [(part.__getitems__([refs[row] for row in mine]), mine) for part, mine in rows if mine]
        if len(found) == 1:
            return found[0][0]
        return interleave([batch for batch, _ in found], [row for _, mine in found for row in mine])


def interleave(batches: Sequence[Batch], rows: Sequence[int]) -> Batch:
    """One batch of all rows of several.

    Args:
        batches: at least one, with rows of S tokens, all with positions or all without.
        rows: for the rows of all batches one after the other, which row each becomes.
    """
    to_row = torch.tensor(rows)
    from_row = to_row.argsort()
    length = batches[0].input_ids.shape[1]
    predicted = torch.cat(_shifted(batches))
    predicted = to_row[predicted // length] * length + predicted % length
    in_order = predicted.argsort()
    positions = [batch.position_ids for batch in batches if batch.position_ids is not None]
    return Batch(
        input_ids=torch.cat([batch.input_ids for batch in batches])[from_row],
        corrupted_ids=torch.cat([batch.corrupted_ids for batch in batches])[from_row],
        predicted=predicted[in_order],
        targets=torch.cat([batch.targets for batch in batches])[in_order],
        row_weights=torch.cat([batch.row_weights for batch in batches])[from_row],
        position_ids=torch.cat(positions)[from_row] if positions else None,
    )


def _shifted(batches: Sequence[Batch]) -> list[Tensor]:
    """Predicted positions of each batch, counted from the first row of the first."""
    shifted, first = [], 0
    for batch in batches:
        shifted.append(batch.predicted + first)
        first += batch.input_ids.numel()
    return shifted
