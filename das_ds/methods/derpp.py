"""DER++: replay of old sequences with the hidden states that the model had when it first saw them.

Shape legend: B local sequences, k replayed ones with them, S tokens, K stored positions of a sequence, H hidden size,
C sequences in the buffer, R of them per global batch, G global batch, W ranks, M micro-steps.
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
from das_ds.models.size import Collective, MemoryUse, ModelSize, Sharding, StepUse

if TYPE_CHECKING:
    from das_ds.config.deepspeed import EngineConfig
    from das_ds.context import DomainContext, RunContext
    from das_ds.data.batch import Batch

DISTANCE_LOSS = "der"
"""Term of alpha."""
REPLAY_LOSS = "replay"
"""Term of beta."""
STREAM = "derpp"
RECORDS = "records"


class DerppConfig(MethodConfig):
    """DER++: replay from a buffer, with the hidden states that the model had when it stored a sequence."""

    state_keys = ("capacity", "max_positions")

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

    (x', y', h') are drawn from a reservoir of all training sequences so far: the sequence as the model read it, with
    its corruption, the tokens predicted at K of its positions, and the final hidden states there. One draw serves both
    terms, where eq. 6 has two: equal in expectation, at half the compute. Logits over 30 to 250 thousand tokens cannot
    be stored; h' determines them up to the LM head.

    Keeps C (4 S + 8 K + 2 H K) bytes over all ranks, row s of the buffer on rank s mod W: 50 KB a sequence for S = 128,
    K = 32, H = 768. Extra compute: R / G more rows in each forward and backward pass, padded to an integer number per
    rank and micro-step, and one all-reduce of R rows per step.

    The stored and drawn sequences depend on seed and step only, not on the number of ranks.
    """

    Config = DerppConfig

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self._seen = 0
        """Sequences of all ranks so far."""
        self._step: int | None = None
        self._buffer: ShardedBuffer | None = None
        self._layout: RecordLayout | None = None

    @classmethod
    def validate(cls, config: RunConfig, engine_config: EngineConfig) -> None:
        """The buffer has enough sequences to replay: after one step it has a global batch, or is full."""
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

    @classmethod
    def step_use(cls, config: RunConfig, size: ModelSize, sharding: Sharding) -> StepUse:
        """Rows of the buffer that are read, and those that are written while it fills; later ever fewer are written."""
        settings = cls.settings_in(config)
        row = 4 * record_layout(config, size.hidden).width
        num_read = settings.num_replayed(config.train.global_batch_size)
        return StepUse(
            collectives=(
                Collective("all_reduce", "replayed rows", num_read * row),
                Collective("all_reduce", "stored rows", config.train.global_batch_size * row),
            ),
            num_losses=2,
        )

    def on_train_start(self, domain: DomainContext) -> None:
        """Draw again at the next step: step numbers restart with the domain."""
        self._step = None

    def on_step_start(self, step: int) -> None:
        """Draw the sequences that this step replays and the slots that it fills; repeated steps draw nothing new."""
        if step != self._step:
            self._step = step
            self._first = self._seen
            size = self.run.config.train.global_batch_size
            # The order of draws from this generator is part of the method: resumed runs repeat it.
            generator = sample_generator(self.run.config.seed, STREAM, self._first // size)
            self._slots = reservoir_slots(self._first, generator.random(size), self.settings.capacity)
            self._offsets = generator.random(size)
            self._replay_batches = self._draw(generator) if self._first else []
        self._seen = self._first

    @contextmanager
    def losses(self, batch: Batch, token_scale: torch.Tensor) -> Iterator[Losses]:
        """The pre-training loss of new and replayed sequences and the distance to stored states, in one forward."""
        micro_step = (self._seen - self._first) // (len(batch.input_ids) * world_size())
        if self._replay_batches:
            hidden, losses = self._forward_with_replay(batch, token_scale, *self._replay_batches[micro_step])
        else:
            hidden, token_losses = self.run.engine(
                batch.corrupted_ids, batch.predicted, batch.targets, batch.position_ids
            )
            zero = token_losses.new_zeros(())
            losses = {self.run.objective: token_losses.sum() * token_scale, DISTANCE_LOSS: zero, REPLAY_LOSS: zero}
        self._store(batch, hidden[: len(batch.input_ids)].detach())
        yield losses

    def state_dict(self) -> ComponentState:
        """This rank's rows of the buffer."""
        if self._buffer is None or self._layout is None:
            return ComponentState(metadata={"seen": 0, "hidden_size": None})
        metadata = {"seen": self._seen, "hidden_size": self._layout.hidden_size}
        return ComponentState(rank_local={RECORDS: self._buffer.rows}, metadata=metadata)

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """Continue with the buffer, resharded where the number of ranks has changed."""
        self._step = None
        self._seen = saved.metadata["seen"]
        self._buffer = None
        self._layout = None
        if (hidden_size := saved.metadata["hidden_size"]) is not None:
            self._build(hidden_size)[1].load(saved.all_rank_local(RECORDS))

    def _build(self, hidden_size: int) -> tuple[RecordLayout, ShardedBuffer]:
        """The buffer, empty at first; the width of hidden states is known after the first forward pass."""
        if self._layout is None or self._buffer is None:
            self._layout = record_layout(self.run.config, hidden_size)
            device = self.run.engine.ranks.info.device
            self._buffer = ShardedBuffer(self.settings.capacity, self._layout.width, device)
        return self._layout, self._buffer

    def _draw(self, generator: np.random.Generator) -> list[tuple[ReplayRecords, torch.Tensor]]:
        """For each micro-step, this rank's replayed sequences and the weights (k, K) of their stored positions."""
        assert self._buffer is not None and self._layout is not None, "the first step stores"
        num_replayed = self.settings.num_replayed(self.run.config.train.global_batch_size)
        num_micro_batches = self.run.engine.accumulation_steps * world_size()
        filled = min(self._first, self.settings.capacity)
        slots = generator.choice(filled, num_replayed, replace=False)
        records = self._layout.unpack(self._buffer.read(slots))
        # The mean over stored positions becomes a sum that DeepSpeed divides by ranks and micro-steps.
        weights = records.weights * (num_micro_batches / records.weights.sum().clamp_min(1.0))
        num_rows = math.ceil(num_replayed / num_micro_batches)
        batches = []
        for first in range(rank() * num_rows, num_micro_batches * num_rows, world_size() * num_rows):
            # Every rank forwards the same number of rows; rows past the last record repeat it with weight 0.
            indices = torch.arange(first, first + num_rows, device=weights.device)
            clamped = indices.clamp_max(num_replayed - 1)
            is_real = (indices < num_replayed)[:, None]
            batches.append((records.index_select(clamped), weights[clamped] * is_real))
        return batches

    def _forward_with_replay(
        self, batch: Batch, token_scale: torch.Tensor, records: ReplayRecords, weights: torch.Tensor
    ) -> tuple[torch.Tensor, Losses]:
        """Hidden states (B + k, S, H) and the losses."""
        num_rows, length = batch.input_ids.shape
        # Replayed rows follow the B new ones; (k, K) positions within rows -> (k * K,) positions in the flat batch.
        rows = torch.arange(len(records.input_ids), device=weights.device)[:, None] + num_rows
        positions = (records.positions + rows * length).flatten()
        position_ids = None
        if batch.position_ids is not None and records.position_ids is not None:
            position_ids = torch.cat((batch.position_ids, records.position_ids))
        hidden, losses = self.run.engine(
            torch.cat((batch.corrupted_ids, records.input_ids)),
            torch.cat((batch.predicted, positions)),
            # Positions without a target have weight 0; any token serves.
            torch.cat((batch.targets, records.targets.clamp_min(0).flatten())),
            position_ids,
        )
        new_losses, replay_losses = losses.split((batch.num_predicted, positions.numel()))
        hidden_now = hidden.flatten(0, 1).index_select(0, positions).view_as(records.stored_hidden)
        distance = (hidden_now.float() - records.stored_hidden.float()).square().mean(dim=-1)
        return hidden, {
            self.run.objective: new_losses.sum() * token_scale,
            DISTANCE_LOSS: self.settings.alpha * (weights * distance).sum(),
            REPLAY_LOSS: self.settings.beta * (weights.flatten() * replay_losses).sum(),
        }

    def _store(self, batch: Batch, hidden: torch.Tensor) -> None:
        """Write the micro-step's sequences that the reservoir accepts into the buffer; a collective."""
        layout, buffer = self._build(hidden.shape[-1])
        size = len(batch.input_ids)
        begin = self._seen - self._first
        self._seen += size * world_size()
        slots = self._slots[begin : begin + size * world_size()]
        # Indices into the micro-step's sequences of all ranks.
        accepted = final_writes(slots)
        if not len(accepted):
            return
        # Rows of the write that this rank fills; the others are summed in from their ranks.
        local_rows = np.flatnonzero(accepted // size == rank())
        local_sequences = to_device_non_blocking(accepted[local_rows] % size, hidden.device)
        first = begin + rank() * size
        offsets = to_device_non_blocking(self._offsets[first : first + size], hidden.device)
        records = with_stored_hidden(batch, hidden, layout, offsets).index_select(local_sequences)
        rows = hidden.new_zeros(len(accepted), layout.width, dtype=torch.int32)
        rows.index_copy_(0, to_device_non_blocking(local_rows, hidden.device), layout.pack(records))
        buffer.write(slots[accepted], rows)


def record_layout(config: RunConfig, hidden_size: int) -> RecordLayout:
    """Layout of a run's buffer; hidden states of 16-bit training keep their type, others become float16."""
    return RecordLayout(
        num_tokens=config.data.sequence_length,
        num_positions=DERpp.settings_in(config).max_positions,
        hidden_size=hidden_size,
        dtype=torch.bfloat16 if config.train.precision == "bf16" else torch.float16,
        has_position_ids=config.data.document_mask,
    )


def with_stored_hidden(
    batch: Batch, hidden: torch.Tensor, layout: RecordLayout, offsets: torch.Tensor
) -> ReplayRecords:
    """A batch with the model's hidden states at K of each sequence's predicted positions.

    A hidden state that is not finite in 16 bits is skipped.

    Args:
        batch: B sequences.
        hidden: (B, S, H) their final hidden states.
        layout: K and the type of stored hidden states.
        offsets: (B,) float64, see `evenly_spaced`.
    """
    size, length = batch.input_ids.shape
    # (B, K) indices into the predicted positions of the batch, and whether there is one.
    chosen, exists = evenly_spaced(batch.predicted, size, length, layout.num_positions, offsets)
    positions = append_zero_row(batch.predicted)[chosen]
    stored_hidden = hidden.flatten(0, 1)[positions].to(layout.dtype)
    exists = exists & stored_hidden.isfinite().all(dim=-1)
    return ReplayRecords(
        input_ids=batch.corrupted_ids,
        positions=torch.where(exists, positions % length, 0),
        targets=torch.where(exists, append_zero_row(batch.targets)[chosen], NO_TARGET),
        stored_hidden=torch.where(exists[..., None], stored_hidden, 0.0),
        position_ids=batch.position_ids,
    )
