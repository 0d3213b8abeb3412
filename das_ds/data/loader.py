"""Data loader: batches for training and evaluation, with the same text and predictions for any number of ranks.

Why not `datasets.map` and torchdata's `StatefulDataLoader`: addressing here is stateless. The sample in row b of rank r
at step t is a pure function of (t, r, b) (`StepPlan`), and its order and corruption are functions of (seed, stream,
sample number) by the counter-based generator Philox (`functional.sampling`). So resuming means starting at another
step, without loader state in checkpoints, and any number of ranks or workers reads the same global batches. The state
of a `StatefulDataLoader` belongs to the ranks and workers that wrote it. Tokens come from memory-mapped files
(`token_file.py`), which need no Arrow table of rows.
"""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from das_ds.data.batch import Batch
from das_ds.data.blocks import Blocks
from das_ds.data.objectives import Collator, add_document_positions
from das_ds.data.replay import MixedRows, SampleRef
from das_ds.data.stream_windows import TokenStream
from das_ds.data.subsets import first_blocks
from das_ds.errors import ConfigError


class SampleStream(Protocol):
    """The endless sequence of samples that a training reads."""

    @property
    def datasets(self) -> tuple[SampleDataset, ...]:
        """The corpora; `SampleRef.source` is an index into them."""

    def ref(self, number: int) -> SampleRef:
        """Global sample `number`, a pure function."""

    def windows(self, number: int) -> Iterator[tuple[TokenStream, int]]:
        """Streams of text among the corpora, and the window that the first sample from `number` on is in."""


@dataclass(frozen=True)
class StepPlan:
    """Batch sampler: rank r of W reads, in step t, micro-step m, row b, global sample t*G + m*W*B + r*B + b.

    The rows of a micro-step are consecutive over the ranks, so that their union does not change with W if W * B stays
    the same.
    """

    samples: SampleStream
    first_step: int
    num_steps: int
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    @property
    def num_micro_steps(self) -> int:
        """Micro-steps per optimizer step, G / (W * B).

        Raises:
            ConfigError: G is not a multiple of W * B.
        """
        rows = self.world_size * self.micro_batch_size
        if self.global_batch_size % rows:
            raise ConfigError(
                f"train.global_batch_size is {self.global_batch_size}; expected a multiple of {rows} = "
                f"{self.world_size} ranks x train.micro_batch_size {self.micro_batch_size}"
            )
        return self.global_batch_size // rows

    def __len__(self) -> int:
        return (self.num_steps - self.first_step) * self.num_micro_steps

    def __iter__(self) -> Iterator[list[SampleRef]]:
        rows = self.world_size * self.micro_batch_size
        begin = self.first_step * self.global_batch_size + self.rank * self.micro_batch_size
        for start in range(begin, begin + len(self) * rows, rows):
            yield [self.samples.ref(number) for number in range(start, start + self.micro_batch_size)]


@dataclass(frozen=True)
class SampleDataset(Dataset[Batch]):
    """One corpus as batches of samples; runs in the loader's worker processes."""

    blocks: Blocks
    collator: Collator
    seed: int
    stream: str

    def __getitems__(self, refs: Sequence[SampleRef]) -> Batch:
        """The batch of these samples; `DataLoader` calls this method if a dataset has it."""
        return self._batch([ref.block for ref in refs], [ref.number for ref in refs])

    def fixed_batch(self, indices: Sequence[int], num_rows: int, padding: int) -> Batch:
        """Blocks with the corruption fixed by their index, padded to `num_rows` with block `padding` at weight 0."""
        return self._batch([*indices, *[padding] * (num_rows - len(indices))], indices)

    def _batch(self, indices: Sequence[int], numbers: Sequence[int]) -> Batch:
        batch = self.collator(self.blocks.index_select(indices), numbers, seed=self.seed, stream=self.stream)
        position_ids = self.blocks.positions(indices)
        return batch if position_ids is None else add_document_positions(batch, position_ids)


def _ignore_signals(_: int) -> None:
    """Stop signals often reach all processes of a job; the run still needs its loader workers for the last steps."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _identity(batch: Any) -> Any:
    """`collate_fn` for batches that the dataset has already collated."""
    return batch


def training_steps(
    samples: SampleStream,
    *,
    first_step: int,
    num_steps: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Generator[list[Batch]]:
    """The micro-batches of optimizer steps first_step .. num_steps - 1, one list per step.

    A step depends only on its number, so that resuming means starting at a later `first_step`. Every epoch visits all
    blocks in a new order and, in masked language modeling, with new corruption.

    Args:
        samples: the sample of each row.
        first_step: first step to yield.
        num_steps: steps of the training in total; the step to stop before.
        global_batch_size: rows per step over all ranks, G.
        micro_batch_size: rows per rank and micro-step, B.
        rank: this rank.
        world_size: number of ranks, W.
        num_workers: loader processes; 0 loads in this one.
        pin_memory: put batches in page-locked memory.

    Raises:
        ConfigError: G is not a multiple of W * B.
    """
    plan = StepPlan(samples, first_step, num_steps, global_batch_size, micro_batch_size, rank, world_size)
    num_micro_steps = plan.num_micro_steps
    loader = DataLoader(
        MixedRows(samples.datasets),
        batch_sampler=plan,
        collate_fn=_identity,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
        # Otherwise the loader draws from the global generator, and a resumed run would have other dropout masks.
        generator=torch.Generator(),
    )
    return _group(iter(loader), num_micro_steps)


def _group(batches: Iterator[Batch], size: int) -> Generator[list[Batch]]:
    while group := list(islice(batches, size)):
        yield group


@dataclass(frozen=True)
class EvaluationBatches:
    """One rank's batches of selected blocks, always the same: corruption is fixed by seed, stream and block index.

    All ranks get equally many batches of equally many rows (at most `batch_size`), padded with rows of weight 0.
    """

    samples: SampleDataset
    indices: Sequence[int]
    batch_size: int
    rank: int
    world_size: int

    def __len__(self) -> int:
        return -(-len(self.indices) // (self.world_size * self.batch_size))

    @property
    def num_rows(self) -> int:
        """Rows per batch; distributed evenly over the batches, so that the last one needs few padding rows."""
        return -(-len(self.indices) // (self.world_size * len(self)))

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < len(self):
            raise IndexError(number)
        rows = self.num_rows
        start = (number * self.world_size + self.rank) * rows
        return self.samples.fixed_batch(self.indices[start : start + rows], rows, self.indices[0])


@dataclass(frozen=True)
class AccumulatedBatches:
    """One rank's micro-batches of selected blocks, one list per global batch; corruption is fixed as for evaluation.

    The blocks of a global batch do not depend on the number of ranks; the last batch is padded with rows of weight 0.
    """

    samples: SampleDataset
    indices: Sequence[int]
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    def __len__(self) -> int:
        return -(-len(self.indices) // self.global_batch_size)

    def __getitem__(self, number: int) -> list[Batch]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        rows = self.micro_batch_size
        begin = number * self.global_batch_size
        starts = range(begin + self.rank * rows, begin + self.global_batch_size, self.world_size * rows)
        return [self.samples.fixed_batch(self.indices[start : start + rows], rows, self.indices[0]) for start in starts]


def evaluation_batches(
    blocks: Blocks,
    collator: Collator,
    *,
    seed: int,
    stream: str,
    batch_size: int,
    rank: int,
    world_size: int,
    max_sequences: int | None = None,
    indices: Sequence[int] | None = None,
) -> EvaluationBatches:
    """This rank's batches of the blocks with these indices, or of the first `max_sequences` blocks (None: all).

    Args:
        blocks: held-out blocks, or training blocks for measuring importance.
        collator: of the run's objective.
        seed: seed of the run.
        stream: name of the use, such as `evaluation/<corpus>`.
        batch_size: maximum rows per rank and batch.
        rank: this rank.
        world_size: number of ranks.
        max_sequences: maximum number of blocks; only without `indices`.
        indices: indices of blocks, at least one.
    """
    selected = first_blocks(blocks, max_sequences) if indices is None else indices
    return EvaluationBatches(SampleDataset(blocks, collator, seed, stream), selected, batch_size, rank, world_size)
