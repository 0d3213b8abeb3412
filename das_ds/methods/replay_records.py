"""Sequences and what the model answered to them, as rows of numbers that can be stored, sent and summed.

Shape legend: n sequences, S tokens each, K positions with an answer, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NO_TARGET = -1


@dataclass(frozen=True)
class ReplayRecords:
    """Sequences as the model read them, with answers at some positions."""

    input_ids: torch.Tensor
    """(n, S) int64."""
    places: torch.Tensor
    """(n, K) int64, positions inside the sequence."""
    targets: torch.Tensor
    """(n, K) int64, the token predicted there; `NO_TARGET` where there are fewer than K positions."""
    answers: torch.Tensor
    """(n, K, H) 16-bit float, final hidden states."""
    position_ids: torch.Tensor | None = None
    """(n, S) int64, where documents are isolated."""

    @property
    def weights(self) -> torch.Tensor:
        """(n, K) float32, 1 where there is an answer."""
        return (self.targets != NO_TARGET).float()

    def take(self, indices: torch.Tensor) -> ReplayRecords:
        """The sequences of these indices (m,)."""
        return ReplayRecords(
            self.input_ids[indices],
            self.places[indices],
            self.targets[indices],
            self.answers[indices],
            None if self.position_ids is None else self.position_ids[indices],
        )


@dataclass(frozen=True)
class RecordLayout:
    """How `ReplayRecords` become int32 numbers and back: 4 bytes a token and position id, 8 + 2 H bytes an answer."""

    num_tokens: int
    """S."""
    num_answers: int
    """K, even, so that answers fill whole numbers."""
    hidden_size: int
    """H."""
    dtype: torch.dtype
    """Of answers; 16 bits."""
    has_positions: bool

    @property
    def width(self) -> int:
        """Numbers per sequence."""
        return self._head + self.num_answers * self.hidden_size // 2

    @property
    def _head(self) -> int:
        return self.num_tokens * (2 if self.has_positions else 1) + 2 * self.num_answers

    def pack(self, rows: ReplayRecords) -> torch.Tensor:
        """(n, width) int32; answers keep their bits."""
        positions = [] if rows.position_ids is None else [rows.position_ids]
        numbers = torch.cat((rows.input_ids, *positions, rows.places, rows.targets), dim=1)
        answers = rows.answers.flatten(1).contiguous().view(torch.int32)
        return torch.cat((numbers.to(torch.int32), answers), dim=1)

    def unpack(self, numbers: torch.Tensor) -> ReplayRecords:
        """The inverse."""
        lengths = [self.num_tokens] * (2 if self.has_positions else 1) + [self.num_answers] * 2
        input_ids, *positions, places, targets = numbers[:, : self._head].long().split(lengths, dim=1)
        answers = numbers[:, self._head :].contiguous().view(self.dtype)
        return ReplayRecords(
            input_ids,
            places,
            targets,
            answers.view(-1, self.num_answers, self.hidden_size),
            positions[0] if positions else None,
        )
