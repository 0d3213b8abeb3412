"""Replay records: sequences with the model's hidden states, as rows of int32 that can be stored, sent and summed.

Shape legend: n sequences, S tokens each, K stored positions, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NO_TARGET = -1


@dataclass(frozen=True)
class ReplayRecords:
    """Sequences as the model read them, with its hidden states at some positions."""

    input_ids: torch.Tensor
    """(n, S) int64."""
    positions: torch.Tensor
    """(n, K) int64, within the sequence."""
    targets: torch.Tensor
    """(n, K) int64, the token predicted there; `NO_TARGET` where a sequence has fewer than K positions."""
    stored_hidden: torch.Tensor
    """(n, K, H) 16-bit float, final hidden states."""
    position_ids: torch.Tensor | None = None
    """(n, S) int64, with document masks."""

    @property
    def weights(self) -> torch.Tensor:
        """(n, K) float32, 1 where there is a stored position."""
        return (self.targets != NO_TARGET).float()

    def index_select(self, indices: torch.Tensor) -> ReplayRecords:
        """The sequences of these indices (m,)."""
        return ReplayRecords(
            self.input_ids[indices],
            self.positions[indices],
            self.targets[indices],
            self.stored_hidden[indices],
            None if self.position_ids is None else self.position_ids[indices],
        )


@dataclass(frozen=True)
class RecordLayout:
    """Layout of `ReplayRecords` as int32: 4 bytes a token and position id, 8 + 2 H bytes a stored position."""

    num_tokens: int
    """S."""
    num_positions: int
    """K, even, so that hidden states fill int32 values."""
    hidden_size: int
    """H."""
    dtype: torch.dtype
    """Of hidden states; 16 bits."""
    has_position_ids: bool

    @property
    def width(self) -> int:
        """int32 values per sequence."""
        return self._num_integers + self.num_positions * self.hidden_size // 2

    @property
    def _num_integers(self) -> int:
        return self.num_tokens * (2 if self.has_position_ids else 1) + 2 * self.num_positions

    def pack(self, records: ReplayRecords) -> torch.Tensor:
        """(n, width) int32; hidden states keep their bits."""
        position_ids = [] if records.position_ids is None else [records.position_ids]
        integers = torch.cat((records.input_ids, *position_ids, records.positions, records.targets), dim=1)
        # Two 16-bit values are one int32.
        hidden = records.stored_hidden.flatten(1).contiguous().view(torch.int32)
        return torch.cat((integers.to(torch.int32), hidden), dim=1)

    def unpack(self, rows: torch.Tensor) -> ReplayRecords:
        """The inverse."""
        lengths = [self.num_tokens] * (2 if self.has_position_ids else 1) + [self.num_positions] * 2
        input_ids, *position_ids, positions, targets = rows[:, : self._num_integers].long().split(lengths, dim=1)
        hidden = rows[:, self._num_integers :].contiguous().view(self.dtype)
        return ReplayRecords(
            input_ids,
            positions,
            targets,
            hidden.view(-1, self.num_positions, self.hidden_size),
            position_ids[0] if position_ids else None,
        )
