"""Random generators as a component of checkpoints."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy
import torch

from das_ds.distributed.process_group import seed_everything
from das_ds.distributed.rng import RngState


def draws() -> list[float]:
    """Numbers from every generator; an odd number of Gaussians leaves one cached in Python's and NumPy's."""
    return [random.random(), random.gauss(0, 1), numpy.random.randn(), float(torch.rand(())), float(torch.randn(()))]


def saved(tensors: dict[str, torch.Tensor]) -> Any:
    return SimpleNamespace(rank_local=lambda: tensors)


def test_rng_state_restored_continues_the_sequence() -> None:
    seed_everything(7)
    draws()
    state = RngState().state_dict().rank_local
    expected = draws()
    seed_everything(8)
    RngState().load_state_dict(saved(state))
    assert draws() == expected


def test_rng_state_without_saved_state_changes_nothing() -> None:
    seed_everything(7)
    expected = draws()
    seed_everything(7)
    RngState().load_state_dict(saved({}))
    assert draws() == expected
