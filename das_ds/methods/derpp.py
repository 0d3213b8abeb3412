"""DER++: old sequences are replayed together with what the model answered when it first saw them.

Shape legend: B local sequences, k replayed ones among them, S positions, K positions with an answer, H hidden size, C
sequences in the buffer, R of them per global batch, G global batch, W ranks, M micro-steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field

from das_ds.config import MethodConfig, RunConfig
from das_ds.config.method import DEFAULT_REPLAY_FRACTION
from das_ds.distributed.collectives import rank, world_size
from das_ds.distributed.sharded_buffer import ShardedBuffer, to_device_non_blocking
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.errors import ConfigError
from das_ds.functional.sampling import append_zero_row, evenly_spaced, final_writes, reservoir_slots, sample_generator
from das_ds.methods.base import Losses, Method
from das_ds.methods.replay_records import NO_TARGET, RecordLayout, ReplayRecords
from das_ds.models.size import MemoryUse, ModelSize, Sharding

if TYPE_CHECKING:
    from das_ds.config.deepspeed import EngineConfig
    from das_ds.context import DomainContext, RunContext
    from das_ds.data.batch import Batch

ANSWER_LOSS, REHEARSAL_LOSS = "answers", "rehearsal"
STREAM, RECORDS = "derpp", "records"


class DerppConfig(MethodConfig):
    """DER++: replay from a buffer, with the hidden states that the model had when it stored a sequence."""

    name: Literal["derpp"] = "derpp"
    alpha: float = Field(default=0.5, ge=0.0)
    """Factor of the distance of final hidden states from the stored ones."""
    beta: float = Field(default=0.5, ge=0.0)
    """Factor of the pre-training loss on replayed sequences."""
    capacity: int = Field(default=1000, ge=1)
    """Sequences in the buffer, over all ranks; each takes 4 bytes a token and 8 + 2 x hidden size a stored position."""
    max_positions: int = Field(default=32, ge=2, multiple_of=2)
    """Most predicted positions of a sequence whose hidden state is stored, an even number; only these are replayed."""
    batch_size: int | None = Field(default=None, ge=1)
    """Sequences replayed with each global batch, on top of it; null: the number nearest to 1 of 16, at least one."""

    def num_replayed(self, global_batch_size: int) -> int:
        """Sequences from the buffer that are added to each global batch."""
        if self.batch_size is not None:
            return self.batch_size
        return max(1, round(DEFAULT_REPLAY_FRACTION * global_batch_size))


class DERpp(Method[DerppConfig]):
    """Dark Experience Replay++ (Buzzega et al., NeurIPS 2020, eq. 6), with hidden states in place of logits.

        L = L_pretrain + alpha E |h(x') - h'|^2 / H + beta E L_pretrain(x', y')

    (x', y', h') are drawn from a reservoir of all training sequences so far: the sequence as it was read, corrupted
    where it was, with the tokens predicted at K of its positions and the final hidden states there. One draw serves
    both terms, where eq. 6 has two: the same in expectation, at half the compute. Logits of 30 to 250 thousand tokens
    cannot be stored; h' is what they are made of, all but the LM head.

    Keeps C (4 S + 8 K + 2 H K) bytes over all ranks, row s of the buffer on rank s mod W: 50 KB a sequence for S = 128,
    K = 32, H = 768. Extra compute: R / G rows more in each forward and backward pass, filled up to a whole number per
    rank and micro-step, and one all-reduce of R rows per step.

    What is kept and drawn depends on seed and step alone, the same on any number of ranks.
    """

    Config = DerppConfig

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self._seen = 0
        """Sequences of all ranks so far."""
        self._step: int | None = None
        self._table: ShardedBuffer | None = None
        self._layout: RecordLayout | None = None

    @classmethod
    def validate(cls, config: RunConfig, engine_config: EngineConfig) -> None:
        """The buffer holds what a step replays: after one step it has a global batch, or is full."""
        settings = cls.settings_in(config)
        global_batch_size = config.train.global_batch_size
        most = min(settings.capacity, global_batch_size)
        if (num_replayed := settings.num_replayed(global_batch_size)) > most:
            raise ConfigError(
                f"method.batch_size: found {num_replayed}, allowed: at most {most}, the smaller of method.capacity "
                f"{settings.capacity} and train.global_batch_size {global_batch_size}"
            )

    @classmethod
    def memory(cls, config: RunConfig, size: ModelSize, sharding: Sharding) -> MemoryUse:
        """The buffer, whose rows are divided over the ranks, and the replayed rows of a forward pass."""
        settings = cls.settings_in(config)
        row = 4 * record_layout(config, size.hidden).width
        replayed = settings.num_replayed(config.train.global_batch_size) * config.train.micro_batch_size
        return MemoryUse(
            device={"buffer": math.ceil(settings.capacity / sharding.num_ranks) * row},
            checkpoint=settings.capacity * row,
            domain=settings.capacity * row,
            extra_rows=math.ceil(replayed / config.train.global_batch_size),
        )

    def on_train_start(self, domain: DomainContext) -> None:
        """Steps are counted anew."""
        self._step = None

    def on_step_start(self, step: int) -> None:
        """Draw what this step replays and where it stores; the same where it is tried again."""
        if step != self._step:
            self._step, self._first = step, self._seen
            size = self.run.config.train.global_batch_size
            generator = sample_generator(self.run.config.seed, STREAM, self._first // size)
            self._slots = reservoir_slots(self._first, generator.random(size), self.settings.capacity)
            self._offsets = generator.random(size)
            self._replayed = self._drawn(generator) if self._first else []
        self._seen = self._first

    @contextmanager
    def losses(self, batch: Batch, token_scale: torch.Tensor) -> Iterator[Losses]:
        """The pre-training loss of new and of replayed sequences and the distance to old answers, in one forward."""
        number = (self._seen - self._first) // (len(batch.input_ids) * world_size())
        if not self._replayed:
            hidden, losses = self.run.engine(batch.corrupted_ids, batch.predicted, batch.targets, batch.position_ids)
            none = losses.new_zeros(())
            parts = {self.run.objective: losses.sum() * token_scale, ANSWER_LOSS: none, REHEARSAL_LOSS: none}
        else:
            hidden, parts = self._rehearsed(batch, token_scale, *self._replayed[number])
        self._store(batch, hidden[: len(batch.input_ids)].detach())
        yield parts

    def state_dict(self) -> ComponentState:
        """This rank's rows of the buffer."""
        if self._table is None or self._layout is None:
            return ComponentState(metadata={"seen": 0, "hidden_size": None})
        numbers = {"seen": self._seen, "hidden_size": self._layout.hidden_size}
        return ComponentState(rank_local={RECORDS: self._table.rows}, metadata=numbers)

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """Continue with the buffer, divided anew where the ranks are others."""
        self._step, self._seen = None, saved.metadata["seen"]
        self._table = self._layout = None
        if (hidden_size := saved.metadata["hidden_size"]) is not None:
            self._build(hidden_size)[1].load(saved.all_rank_local(RECORDS))

    def _build(self, hidden_size: int) -> tuple[RecordLayout, ShardedBuffer]:
        """The buffer, empty; how wide final hidden states are is known when there are some."""
        if self._layout is None or self._table is None:
            self._layout = record_layout(self.run.config, hidden_size)
            device = self.run.engine.ranks.info.device
            self._table = ShardedBuffer(self.settings.capacity, self._layout.width, device)
        return self._layout, self._table

    def _drawn(self, generator: np.random.Generator) -> list[tuple[ReplayRecords, torch.Tensor]]:
        """For each micro-step, this rank's replayed sequences and the weights (k, K) of their answers."""
        assert self._table is not None and self._layout is not None, "the first step stores"
        num_replayed = self.settings.num_replayed(self.run.config.train.global_batch_size)
        num_units = self.run.engine.accumulation_steps * world_size()
        filled = min(self._first, self.settings.capacity)
        rows = self._layout.unpack(self._table.read(generator.choice(filled, num_replayed, replace=False)))
        # The mean over answers becomes a sum that DeepSpeed divides by ranks and micro-steps.
        weights = rows.weights * (num_units / rows.weights.sum().clamp_min(1.0))
        per_unit = -(-num_replayed // num_units)
        drawn = []
        for first in range(rank() * per_unit, num_units * per_unit, world_size() * per_unit):
            # Every rank passes equally many rows; those beyond the last count nothing.
            index = torch.arange(first, first + per_unit, device=weights.device)
            own = index.clamp_max(num_replayed - 1)
            drawn.append((rows.take(own), weights[own] * (index < num_replayed)[:, None]))
        return drawn

    def _rehearsed(
        self, batch: Batch, token_scale: torch.Tensor, old: ReplayRecords, weights: torch.Tensor
    ) -> tuple[torch.Tensor, Losses]:
        """Hidden states (B + k, S, H) and the losses."""
        length = batch.input_ids.shape[1]
        first_rows = torch.arange(len(old.input_ids), device=weights.device)[:, None] + len(batch.input_ids)
        places = (old.places + first_rows * length).flatten()
        positions = None
        if batch.position_ids is not None and old.position_ids is not None:
            positions = torch.cat((batch.position_ids, old.position_ids))
        hidden, losses = self.run.engine(
            torch.cat((batch.corrupted_ids, old.input_ids)),
            torch.cat((batch.predicted, places)),
            torch.cat((batch.targets, old.targets.clamp_min(0).flatten())),
            positions,
        )
        new, again = losses.split((batch.num_predicted, places.numel()))
        answers = hidden.flatten(0, 1).index_select(0, places).view_as(old.answers)
        distance = (answers.float() - old.answers.float()).square().mean(dim=-1)
        return hidden, {
            self.run.objective: new.sum() * token_scale,
            ANSWER_LOSS: self.settings.alpha * (weights * distance).sum(),
            REHEARSAL_LOSS: self.settings.beta * (weights.flatten() * again).sum(),
        }

    def _store(self, batch: Batch, hidden: torch.Tensor) -> None:
        """Put those of the micro-step's sequences that the reservoir takes into the buffer; a collective."""
        layout, table = self._build(hidden.shape[-1])
        size, begin = len(batch.input_ids), self._seen - self._first
        self._seen += size * world_size()
        slots = self._slots[begin : begin + size * world_size()]
        kept = final_writes(slots)
        if not len(kept):
            return
        given = np.flatnonzero(kept // size == rank())
        first = begin + rank() * size
        offsets = to_device_non_blocking(self._offsets[first : first + size], hidden.device)
        own = answered(batch, hidden, layout, offsets).take(to_device_non_blocking(kept[given] % size, hidden.device))
        rows = hidden.new_zeros(len(kept), layout.width, dtype=torch.int32)
        rows.index_copy_(0, to_device_non_blocking(given, hidden.device), layout.pack(own))
        table.write(slots[kept], rows)


def record_layout(config: RunConfig, hidden_size: int) -> RecordLayout:
    """Layout of a run's buffer; hidden states of 16-bit training keep their type, others become float16."""
    return RecordLayout(
        num_tokens=config.data.sequence_length,
        num_answers=DERpp.settings_in(config).max_positions,
        hidden_size=hidden_size,
        dtype=torch.bfloat16 if config.train.precision == "bf16" else torch.float16,
        has_positions=config.data.document_mask,
    )


def answered(batch: Batch, hidden: torch.Tensor, layout: RecordLayout, offsets: torch.Tensor) -> ReplayRecords:
    """A batch with the model's answers at K of each sequence's predicted positions.

    An answer that is not finite, or not in 16 bits, is none.

    Args:
        batch: B sequences.
        hidden: (B, S, H) final hidden states of these.
        layout: K and the type of answers.
        offsets: (B,) float64, see `evenly_spaced`.
    """
    size, length = batch.input_ids.shape
    chosen, exists = evenly_spaced(batch.predicted, size, length, layout.num_answers, offsets)
    places = append_zero_row(batch.predicted)[chosen]
    answers = hidden.flatten(0, 1)[places].to(layout.dtype)
    exists = exists & answers.isfinite().all(dim=-1)
    return ReplayRecords(
        input_ids=batch.corrupted_ids,
        places=torch.where(exists, places % length, 0),
        targets=torch.where(exists, append_zero_row(batch.targets)[chosen], NO_TARGET),
        answers=torch.where(exists[..., None], answers, 0.0),
        position_ids=batch.position_ids,
    )
