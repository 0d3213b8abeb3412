"""Checks of what masks leave, against float64."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from das_ds.data.batch import Batch
from helpers.moments import moments_config
from helpers.plasticity import expected_plasticity, find_plasticity
from helpers.run_ranks import run_ranks
from helpers.training import random_batch

NUM_ROWS = 6


@cache
def make_batches() -> tuple[Batch, ...]:
    return tuple(random_batch(NUM_ROWS, seed) for seed in range(2))


@cache
def expected() -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]:
    return expected_plasticity(list(make_batches()))


def check_plasticity(folder: Path, world_size: int, stage: int) -> None:
    """Every rank finds the same, for every input, by every number of ranks."""
    config = moments_config(folder, world_size, stage, NUM_ROWS)
    found = run_ranks(find_plasticity, world_size, config, list(make_batches()), "full")
    assert all(each == found[0] for each in found)
    for readings, values in zip(found[0], expected(), strict=True):
        assert len(readings) == 10
        for name, reading in readings.items():
            # The embeddings are named after the LM head's decoder, which shares them, by plain torch.
            share, passing = values.get(name) or values["lm_head.decoder.weight"]
            assert reading.plasticity == pytest.approx(share, rel=1e-5), name
            assert reading.passing == pytest.approx(passing, rel=1e-4), name
    assert len({reading.passing for reading in found[0][0].values()}) == 10
