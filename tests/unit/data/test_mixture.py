"""Mixed domains: balanced, independent of the number of ranks, with the samples of single domains."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from das_ds.data.batch import Batch
from das_ds.data.loader import SampleDataset, training_steps
from das_ds.data.mixture import MixedDomains, SingleDomain
from das_ds.data.objectives import MLMCollator
from das_ds.data.token_blocks import TokenBlocks
from das_ds.data.token_file import TokenCorpus, TokenFile
from das_ds.functional import sampling

LENGTH = 16
GLOBAL_BATCH = 8
STEPS_PER_DOMAIN = 5
FIRST_TOKEN = {"papers": 5, "food": 100, "news": 200}
"""Block i of a corpus contains only its token + i."""
NUM_BLOCKS = {"papers": 30, "food": 3, "news": 50}
MASKER = MLMCollator(4, (0, 1, 2, 3, 4), 300, 0.3)
NUM_STEPS = STEPS_PER_DOMAIN * len(NUM_BLOCKS)

Row = tuple[str, int, tuple[int, ...]]
"""Corpus, token of its block, input of the model."""


@pytest.fixture
def samples(tmp_path: Path) -> dict[str, SampleDataset]:
    made = {}
    for name, num_blocks in NUM_BLOCKS.items():
        path = tmp_path / f"{name}.bin"
        np.repeat(np.arange(FIRST_TOKEN[name], FIRST_TOKEN[name] + num_blocks), LENGTH).astype("<u2").tofile(path)
        blocks = TokenBlocks(TokenCorpus("text", (TokenFile(path, "<u2", num_blocks * LENGTH, 1),)), LENGTH)
        made[name] = SampleDataset(blocks, MASKER, 0, f"train/{name}")
    return made


def list_rows(batch: Batch) -> list[Row]:
    rows = zip(batch.input_ids[:, 0].tolist(), batch.corrupted_ids.tolist(), strict=True)
    return [(_corpus(token), token, tuple(seen)) for token, seen in rows]


def _corpus(token: int) -> str:
    return next(name for name in ("news", "food", "papers") if token >= FIRST_TOKEN[name])


def load(
    samples: dict[str, SampleDataset],
    *,
    micro_batch_size: int = GLOBAL_BATCH,
    rank: int = 0,
    world_size: int = 1,
    first_step: int = 0,
    num_workers: int = 0,
) -> list[list[list[Row]]]:
    """Step -> micro-step -> rows."""
    steps = training_steps(
        MixedDomains(tuple(samples.values())),
        first_step=first_step,
        num_steps=NUM_STEPS,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
    )
    return [[list_rows(batch) for batch in step] for step in steps]


def test_mixed_domains_consecutive_rows_are_balanced(samples: dict[str, SampleDataset]) -> None:
    rows = [name for (batch,) in load(samples) for name, _, _ in batch]
    for length in range(1, len(rows) + 1):
        for begin in range(0, len(rows) - length + 1, 7):
            counts = Counter(rows[begin : begin + length])
            shares = [counts[name] for name in NUM_BLOCKS]
            assert min(shares) >= length // 3 and max(shares) <= -(-length // 3), (begin, length)
    assert set(Counter(rows).values()) == {STEPS_PER_DOMAIN * GLOBAL_BATCH}


def test_mixed_domains_samples_equal_single_domains(samples: dict[str, SampleDataset]) -> None:
    """Of each domain the same samples in the same order, corruption included."""
    pooled = [row for (batch,) in load(samples) for row in batch]
    for name, mine in samples.items():
        expected = _load_steps(SingleDomain(mine, GLOBAL_BATCH), STEPS_PER_DOMAIN)
        assert [row for row in pooled if row[0] == name] == expected


def test_mixed_domains_of_different_lengths_equal_single_domains(samples: dict[str, SampleDataset]) -> None:
    lengths = {"papers": 6, "food": 1, "news": 3}
    pooled = _load_steps(MixedDomains(tuple(samples.values()), tuple(lengths.values())), sum(lengths.values()))
    for name, mine in samples.items():
        expected = _load_steps(SingleDomain(mine, GLOBAL_BATCH), lengths[name])
        assert [row for row in pooled if row[0] == name] == expected
    for begin in range(0, len(pooled) - 10):
        counts = Counter(name for name, _, _ in pooled[begin : begin + 10])
        assert all(abs(counts[name] - length) < 2 for name, length in lengths.items())


def _load_steps(stream: MixedDomains | SingleDomain, num_steps: int) -> list[Row]:
    steps = training_steps(
        stream,
        first_step=0,
        num_steps=num_steps,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=GLOBAL_BATCH,
        rank=0,
        world_size=1,
    )
    return [row for (batch,) in steps for row in list_rows(batch)]


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 2), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_mixed_domains_independent_of_ranks(
    samples: dict[str, SampleDataset], world_size: int, micro_batch_size: int
) -> None:
    full = [batch for (batch,) in load(samples)]
    ranks = [
        load(samples, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for step, expected in zip(zip(*ranks, strict=True), full, strict=True):
        found = [row for losses in zip(*step, strict=True) for batch in losses for row in batch]
        # In the order of the global batch, not only as a set.
        assert found == expected


@pytest.mark.parametrize(("first_step", "num_workers"), [(1, 0), (7, 0), (NUM_STEPS, 0), (3, 2)])
def test_mixed_domains_resumed_with_workers(
    samples: dict[str, SampleDataset], first_step: int, num_workers: int
) -> None:
    assert load(samples, first_step=first_step, num_workers=num_workers) == load(samples)[first_step:]


def test_mixed_domains_shuffle_each_epoch_once(
    samples: dict[str, SampleDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orders of large corpora are slow to make; many domains in turn may not drive each other's out of memory."""
    made = []
    epoch_order = sampling.epoch_order

    def noted(num_samples: int, seed: int, stream: str, epoch: int) -> np.ndarray:
        made.append((stream, epoch))
        return epoch_order(num_samples, seed, stream, epoch)

    monkeypatch.setattr(sampling, "epoch_order", noted)
    load(samples)
    assert len(made) == len(set(made))
    epochs = {name: [epoch for stream, epoch in made if stream == f"train/{name}"] for name in NUM_BLOCKS}
    assert epochs["papers"] == [0, 1] and epochs["news"] == [0] and len(epochs["food"]) == 14
    assert all(next_one == epoch + 1 for found in epochs.values() for epoch, next_one in pairwise(found))
