"""Replay of earlier text: the samples it contributes, and batches whose rows come from several corpora.

Shape legend: B rows, S tokens per row, P predicted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from das_ds.data.batch import Batch
from das_ds.data.blocks import Blocks
from das_ds.data.objectives import Collator
from das_ds.functional.sampling import sample_generator

REPLAY_STREAM = "/replay"
"""Suffix of the stream name of replayed samples."""


class SampleRef(NamedTuple):
    """One row of a batch."""

    number: int
    """Sample number, which fixes its corruption: among the domain's own samples, or among all replayed ones."""
    block: int
    """Index of the block."""
    source: int = 0
    """Index of the corpus in `SampleStream.datasets`; with replay: 0 is the domain, i + 1 is replayed corpus i."""
    is_replayed: bool = False
    """Whether it is earlier text that takes the place of the domain's."""


class RowSource(Protocol):
    """Makes batches of one corpus; ignores `SampleRef.source`."""

    def __getitems__(self, refs: Sequence[SampleRef]) -> Batch:
        """The batch of these samples."""


@dataclass(frozen=True)
class Replay:
    """The replayed sequences in each global batch of a domain."""

    num_sequences: int = 0
    """Replayed sequences per global batch."""
    sources: tuple[tuple[Blocks, Collator], ...] = ()
    """Blocks of each replayed corpus, and the collator for its tokenizer."""

    def ref(self, number: int, seed: int, stream: str) -> SampleRef:
        """Replayed sample `number` of a stream: round robin over the corpora, so that large ones do not dominate.

        Blocks are drawn with replacement: few of many are replayed, so a permutation per corpus is not worth keeping.
        The sources of a corpus that is a mixture take turns as they do when it is learned.
        """
        corpus_number, source = divmod(number, len(self.sources))
        blocks = self.sources[source][0]
        generator = sample_generator(seed, f"{stream}{REPLAY_STREAM}/choice", number)
        part = blocks.part_of(corpus_number)
        return SampleRef(number, part.start + int(generator.integers(len(part))), source + 1, is_replayed=True)


NO_REPLAY = Replay()


@dataclass(frozen=True)
class MixedRows(Dataset[Batch]):
    """Batches whose rows come from several corpora; runs in the loader's worker processes."""

    datasets: tuple[RowSource, ...]
    """`SampleRef.source` is an index into them."""

    def __getitems__(self, refs: Sequence[SampleRef]) -> Batch:
        """The batch of these samples; `DataLoader` calls this method if a dataset has it."""
        batches: list[Batch] = []
        order: list[int] = []
        for source, dataset in enumerate(self.datasets):
            rows = [row for row, ref in enumerate(refs) if ref.source == source]
            if rows:
                batches.append(dataset.__getitems__([refs[row] for row in rows]))
                order += rows
        batch = batches[0] if len(batches) == 1 else interleave(batches, order)
        return mark_replayed(batch, [row for row, ref in enumerate(refs) if ref.is_replayed])


def mark_replayed(batch: Batch, rows: Sequence[int]) -> Batch:
    """A batch that says which of its rows are replayed; `rows` are their indices, ascending."""
    if not rows:
        return batch
    replayed_rows = torch.tensor(rows)
    is_replayed = torch.isin(batch.predicted // batch.input_ids.shape[1], replayed_rows)
    return replace(batch, replayed_rows=replayed_rows, replayed=is_replayed.nonzero().squeeze(1))


def interleave(batches: Sequence[Batch], rows: Sequence[int]) -> Batch:
    """Merge several batches into one with the rows in a given order.

    Args:
        batches: at least one, with rows of S tokens, all with `position_ids` or all without.
        rows: the new row of each row of the concatenated batches, a permutation.
    """
    to_row = torch.tensor(rows)
    from_row = to_row.argsort()
    length = batches[0].input_ids.shape[1]
    predicted = torch.cat(_offset_predicted(batches))
    # Move each predicted position with its row, then restore ascending order.
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


def _offset_predicted(batches: Sequence[Batch]) -> list[Tensor]:
    """Predicted positions of each batch as indices into the concatenated batches."""
    positions: list[Tensor] = []
    offset = 0
    for batch in batches:
        positions.append(batch.predicted + offset)
        offset += batch.input_ids.numel()
    return positions
