"""Batches of training and of evaluation, the same text with the same predictions for any number of ranks."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from das_ds.data.batch import Batch
from das_ds.data.blocks import TokenBlocks
from das_ds.data.objectives import Collator, add_document_positions
from das_ds.data.replay import MixedRows, SampleRef
from das_ds.errors import ConfigError


class SampleStream(Protocol):
    """What a training reads."""

    @property
    def parts(self) -> tuple[SampleDataset, ...]:
        """The corpora, by source."""

    def ref(self, number: int) -> SampleRef:
        """Global sample `number` of the training, a pure function."""


@dataclass(frozen=True)
class StepPlan:
    """Which samples rank r of W reads: in step t, micro-step m, row b the global sample t*G + m*W*B + r*B + b.

    Rows of one micro-step are consecutive over the ranks, so their union does not depend on W while W * B stays.
    """

    reading: SampleStream
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
            ConfigError: the global batch is not a whole number of micro-steps.
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
            yield [self.reading.ref(number) for number in range(start, start + self.micro_batch_size)]


@dataclass(frozen=True)
class SampleDataset(Dataset[Batch]):
    """Turns the sample references of a micro-batch into the batch; runs in the loader's processes."""

    blocks: TokenBlocks
    objective: Collator
    seed: int
    stream: str

    def __getitems__(self, refs: Sequence[SampleRef]) -> Batch:
        """The batch of the given samples, which the loader asks for by this name."""
        return self._batch([ref.block for ref in refs], [ref.number for ref in refs])

    def fixed_batch(self, indices: Sequence[int], num_rows: int, filling: int) -> Batch:
        """Blocks under the corruption that their index fixes, filled to `num_rows` with block `filling` at weight 0."""
        return self._batch([*indices, *[filling] * (num_rows - len(indices))], indices)

    def _batch(self, indices: Sequence[int], numbers: Sequence[int]) -> Batch:
        batch = self.objective.batch(self.blocks.take(indices), numbers, seed=self.seed, stream=self.stream)
        position_ids = self.blocks.positions(indices)
        return batch if position_ids is None else add_document_positions(batch, position_ids)


def _ignore_signals(_: int) -> None:
    """Signals that ask the run to stop often reach all its processes; it still needs these for its last steps."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _as_is(batch: Any) -> Any:
    return batch


def training_steps(
    reading: SampleStream,
    *,
    first_step: int,
    num_steps: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[list[Batch]]:
    """The micro-batches of optimizer steps first_step .. num_steps - 1, one list per step.

    A step depends only on its number, so resuming is starting at a later `first_step`. Every epoch visits all blocks
    in a new order and, in masked language modeling, with new corruption.

    Args:
        reading: which sample of which corpus each row is.
        first_step: first step to yield.
        num_steps: steps of the whole training, the number to stop before.
        global_batch_size: rows per step over all ranks, G.
        micro_batch_size: rows per rank and micro-step, B.
        rank: this rank.
        world_size: number of ranks, W.
        num_workers: loader processes; 0 loads in this one.
        pin_memory: put batches in page-locked memory.

    Raises:
        ConfigError: the global batch is not a whole number of micro-steps.
    """
    plan = StepPlan(reading, first_step, num_steps, global_batch_size, micro_batch_size, rank, world_size)
    num_micro_steps = plan.num_micro_steps
    loader = DataLoader(
        MixedRows(reading.parts),
        batch_sampler=plan,
        collate_fn=_as_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
        # Without its own generator the loader draws from torch's, and a resumed run would see other dropout masks.
        generator=torch.Generator(),
    )
    return _grouped(iter(loader), num_micro_steps)


def _grouped(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    while group := list(islice(batches, size)):
        yield group


@dataclass(frozen=True)
class EvaluationBatches:
    """One rank's batches of chosen blocks, always the same: corruption is fixed by seed, stream and block index.

    All ranks get equally many batches of equally many rows (at most `batch_size`), filled with rows of weight 0.
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
        """Rows per batch; spread evenly over the batches, so that the last one needs few rows to fill it."""
        return -(-len(self.indices) // (self.world_size * len(self)))

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < len(self):
            raise IndexError(number)
        rows = self.num_rows
        start = (number * self.world_size + self.rank) * rows
        return self.samples.fixed_batch(self.indices[start : start + rows], rows, self.indices[0])


@dataclass(frozen=True)
class AccumulatedBatches:
    """One rank's micro-batches of chosen blocks, one list per global batch; corruption is fixed as for evaluation.

    Which blocks form a global batch does not depend on the number of ranks; the last one is filled with rows of
    weight 0.
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
        rows, filling, begin = self.micro_batch_size, self.indices[0], number * self.global_batch_size
        starts = range(begin + self.rank * rows, begin + self.global_batch_size, self.world_size * rows)
        return [self.samples.fixed_batch(self.indices[s : s + rows], rows, filling) for s in starts]


def evaluation_batches(
    blocks: TokenBlocks,
    objective: Collator,
    *,
    seed: int,
    stream: str,
    batch_size: int,
    rank: int,
    world_size: int,
    max_sequences: int | None = None,
    indices: Sequence[int] | None = None,
) -> EvaluationBatches:
    """This rank's share of the given blocks, or of the first `max_sequences` (all where None).

    Args:
        blocks: held-out blocks, or training blocks for measuring importance.
        objective: what a row predicts.
        seed: seed of the run.
        stream: name of the use, for instance `evaluation/<corpus>`.
        batch_size: most rows per rank and batch.
        rank: this rank.
        world_size: number of ranks.
        max_sequences: number of blocks to use at most; only without `indices`.
        indices: block indices to use, at least one.
    """
    chosen = range(len(blocks))[:max_sequences] if indices is None else indices
    return EvaluationBatches(SampleDataset(blocks, objective, seed, stream), chosen, batch_size, rank, world_size)
