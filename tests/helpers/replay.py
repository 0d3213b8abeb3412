"""Method derpp as plain torch gives it: float64, one process, one sequence at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from das_ds.data.batch import Batch
from das_ds.functional.sampling import sample_generator
from helpers.training import LENGTH

CAPACITY = 10
REPLAYED = 3
POSITIONS = 2
ALPHA = 2.0
BETA = 0.5
# Three sequences over two ranks and two micro-steps: one place is filled up. Rows predict more and fewer than two.
DERPP: dict[str, Any] = {
    "name": "derpp",
    "capacity": CAPACITY,
    "batch_size": REPLAYED,
    "max_positions": POSITIONS,
    "alpha": ALPHA,
    "beta": BETA,
}


@dataclass(frozen=True)
class StoredSequence:
    """One stored sequence."""

    input_ids: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    answers: torch.Tensor


class PlainBuffer:
    """The reservoir, sample by sample, and the losses on what is drawn from it."""

    def __init__(self) -> None:
        self._slots: dict[int, StoredSequence] = {}
        self._seen = 0

    def step(self, model: PreTrainedModel, step: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of this step by the buffer before it; then its sequences go through the reservoir."""
        size = sum(len(batch.input_ids) for batch in step)
        generator = sample_generator(0, "derpp", self._seen // size)
        uniforms = generator.random(size)
        offsets = generator.random(size)
        drawn: list[int] = []
        if self._slots:
            drawn = generator.choice(len(self._slots), REPLAYED, replace=False).tolist()
        losses = self._losses(model, [self._slots[slot] for slot in drawn])
        rows = [(batch, row) for batch in step for row in range(len(batch.input_ids))]
        for (batch, row), u, offset in zip(rows, uniforms, offsets, strict=True):
            slot = self._seen if self._seen < CAPACITY else int(u * (self._seen + 1))
            if slot < CAPACITY:
                self._slots[slot] = _memory(model, batch, row, offset)
            self._seen += 1
        return losses

    @staticmethod
    def _losses(model: PreTrainedModel, memories: list[StoredSequence]) -> tuple[torch.Tensor, torch.Tensor]:
        distances = [torch.zeros(0, dtype=torch.float64)]
        token_losses = [torch.zeros(0, dtype=torch.float64)]
        for memory in memories:
            hidden = model.base_model(input_ids=memory.input_ids[None]).last_hidden_state[0, memory.places]
            logits = model(input_ids=memory.input_ids[None]).logits[0, memory.places]
            distances.append((hidden - memory.answers.double()).square().mean(dim=1))
            token_losses.append(functional.cross_entropy(logits, memory.targets, reduction="none"))
        count = max(1, sum(len(part) for part in distances))
        return ALPHA * torch.cat(distances).sum() / count, BETA * torch.cat(token_losses).sum() / count


@torch.no_grad()
def _memory(model: PreTrainedModel, batch: Batch, row: int, offset: float) -> StoredSequence:
    own = (batch.predicted // LENGTH == row).nonzero().squeeze(1)
    if len(own) > POSITIONS:
        own = own[np.floor((np.arange(POSITIONS) + offset) * len(own) / POSITIONS).astype(int).tolist()]
    places = batch.predicted[own] - row * LENGTH
    hidden = model.base_model(input_ids=batch.corrupted_ids[row][None]).last_hidden_state[0]
    return StoredSequence(batch.corrupted_ids[row], places, batch.targets[own], hidden[places].half())
