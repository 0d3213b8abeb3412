"""Checks of what ranks hold of moments and projectors, against float64 and between numbers of ranks."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import torch

from das_ds.data.batch import Batch
from helpers.moments import SATURATION, RankMoments, hold_moments, moments_config
from helpers.run_ranks import run_ranks
from helpers.tiny_models import NO_DROPOUT, tiny_model
from helpers.training import random_batch
from helpers.two_domains import _normalized_moments

NUM_ROWS = 6
SMALL_BUDGET = 3 * 4 * 24**2
"""Three inputs as wide as the hidden states; five passes for ten inputs."""
ONE_PASS = 1 << 30


def make_batches() -> list[Batch]:
    return [random_batch(NUM_ROWS, seed) for seed in range(3)]


@cache
def expected_moments() -> dict[str, torch.Tensor]:
    """Weight -> M in float64, one position after the other."""
    model = torch.nn.Module.to(copy.deepcopy(tiny_model(**NO_DROPOUT)), torch.float64).train(False)
    return _normalized_moments(model, make_batches())


def check_moments(folder: Path, world_size: int, stage: int) -> list[RankMoments]:
    """Every moment is at its owner and nowhere else, and every projector where a matrix of its input is stepped."""
    config = moments_config(folder, world_size, stage, NUM_ROWS)
    found = run_ranks(hold_moments, world_size, config, make_batches(), SMALL_BUDGET)
    inputs = found[0].inputs
    for rank, held in enumerate(found):
        assert held.inputs == inputs
        assert held.moments.keys() == {name for name, owner in inputs.owners.items() if owner == rank}
        assert held.projectors.keys() == held.stepped
        # Nothing else, in bytes of what the tensors keep alive.
        num_bytes = sum(moment.untyped_storage().nbytes() for moment in held.moments.values())
        assert num_bytes == sum(4 * inputs.widths[name] ** 2 for name in held.moments)
    moments = {name: moment for held in found for name, moment in held.moments.items()}
    assert moments.keys() == inputs.widths.keys() and len(moments) == 10
    for matrix in inputs.matrices:
        expected = expected_moments()[matrix.name]
        torch.testing.assert_close(moments[matrix.input].double(), expected, rtol=1e-4, atol=1e-5)
        projector = torch.linalg.inv(torch.eye(matrix.width).double() + expected / SATURATION)
        for held in found:
            if matrix.input in held.projectors:
                torch.testing.assert_close(held.projectors[matrix.input].double(), projector, rtol=1e-4, atol=1e-5)
    return found
