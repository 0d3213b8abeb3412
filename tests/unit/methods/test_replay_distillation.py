"""What the teacher of replayed text reads, and networks that cannot be distilled."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from das_ds.data.batch import Batch
from das_ds.data.replay import mark_replayed
from das_ds.errors import ConfigError
from das_ds.methods.replay_distillation import ReplayDistillation, _teacher_inputs
from helpers.configs import make_config

REPLAY_KL = "method={name: ncl, replay: {fraction: 0.5, loss: kl}}"


def test_teacher_inputs_are_replayed_rows() -> None:
    ids = torch.arange(20).view(4, 5)
    predicted = torch.tensor([0, 4, 7, 10, 13, 16, 19])
    plain = Batch(ids, ids + 100, predicted, predicted + 50, torch.ones(4), ids + 1000)
    batch = mark_replayed(plain, [0, 3])
    assert batch.replayed is not None and batch.replayed.tolist() == [0, 1, 5, 6]
    input_ids, positions, position_ids = _teacher_inputs(batch)
    assert input_ids.tolist() == (ids + 100)[[0, 3]].tolist()
    assert position_ids is not None and position_ids.tolist() == (ids + 1000)[[0, 3]].tolist()
    # The same tokens as in the batch.
    assert input_ids.flatten()[positions].tolist() == [100, 104, 116, 119] and positions.tolist() == [0, 4, 6, 9]


def test_replay_kl_without_linear_head_is_error() -> None:
    run: Any = SimpleNamespace(config=make_config("run", REPLAY_KL), network=SimpleNamespace(can_distill=False))
    method: Any = SimpleNamespace(run=run)
    with pytest.raises(ConfigError, match=r"method.replay.loss: found kl with an LM head .* allowed there: ce"):
        ReplayDistillation(method)
