"""A held-out text without predicted tokens is an error."""

from __future__ import annotations

import pytest
import torch

from das_ds.data.batch import Batch
from das_ds.distributed.resumable import ResumableLoop
from das_ds.errors import DataError
from das_ds.training.evaluate import compute_eval_loss


class Silent(torch.nn.Module):
    """Gives a loss for every predicted token."""

    def forward(self, ids: torch.Tensor, predicted: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        return ids, torch.full((len(predicted),), 2.0)


def make_batch(predicted: list[int]) -> Batch:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    places = torch.tensor(predicted, dtype=torch.int64)
    return Batch(ids, ids, places, places, torch.ones(1))


def test_eval_loss_is_mean_over_predicted_tokens() -> None:
    assert compute_eval_loss(Silent(), ResumableLoop([make_batch([1, 2]), make_batch([])]), torch.device("cpu")) == 2.0


def test_eval_loss_without_predicted_tokens_raises() -> None:
    with pytest.raises(DataError, match=r"found no predicted token in the held-out text.*data\.mlm_probability"):
        compute_eval_loss(Silent(), ResumableLoop([make_batch([])]), torch.device("cpu"))
