"""Replay: an exact fraction of every global batch, independent of ranks; rows equal those of single corpora."""

from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from das_ds.data.batch import Batch
from das_ds.data.loader import SampleDataset, training_steps
from das_ds.data.mixture import SingleDomain
from das_ds.data.objectives import CausalLMCollator, Collator, MLMCollator
from das_ds.data.replay import Replay, interleave
from das_ds.data.token_blocks import TokenBlocks
from das_ds.data.token_file import TokenCorpus, TokenFile
from das_ds.functional.sampling import replay_number

LENGTH = 16
NUM_STEPS = 6
FIRST_TOKEN = 5
SPECIAL = (0, 1, 2, 3, 4)
NUM_BLOCKS = {"papers": 30, "food": 3, "news": 50}
"""The domain, then the replayed corpora."""
TOKEN = {"papers": 5, "food": 100, "news": 200}
"""Block i of a corpus contains only its token + i."""
MASKERS = {name: MLMCollator(4, SPECIAL, vocab, 0.3) for name, vocab in (("papers", 400), ("food", 300), ("news", 350))}


@pytest.mark.parametrize(
    ("size", "num_replayed"), [(1, 0), (8, 0), (8, 1), (8, 3), (8, 7), (12, 5), (16, 2), (16, 4), (21, 6)]
)
def test_replay_number_is_exact_and_evenly_spread(size: int, num_replayed: int) -> None:
    found = [replay_number(number, size, num_replayed) for number in range(size * size)]
    is_replayed = np.array([replayed for replayed, _ in found]).reshape(size, size)
    assert (is_replayed.sum(axis=1) == num_replayed).all()
    assert (is_replayed.sum(axis=0) == num_replayed).all()
    for kind in (True, False):
        numbers = [number for replayed, number in found if replayed == kind]
        assert numbers == list(range(len(numbers)))
    for length in range(1, size + 1):
        expected = length * num_replayed / size
        for step in is_replayed.astype(int):
            counts = np.convolve(step, np.ones(length, dtype=int), "valid")
            assert np.floor(expected) <= counts.min() and counts.max() <= np.ceil(expected)


@pytest.fixture
def corpora(tmp_path: Path) -> dict[str, TokenBlocks]:
    made = {}
    for name, num_blocks in NUM_BLOCKS.items():
        path = tmp_path / f"{name}.bin"
        np.repeat(np.arange(TOKEN[name], TOKEN[name] + num_blocks), LENGTH).astype("<u2").tofile(path)
        made[name] = TokenBlocks(TokenCorpus("text", (TokenFile(path, "<u2", num_blocks * LENGTH, 1),)), LENGTH)
    return made


@dataclass(frozen=True)
class Row:
    """One row of a batch, with positions relative to the row."""

    token: int
    corrupted: tuple[int, ...]
    predicted: tuple[tuple[int, int], ...]

    @property
    def corpus(self) -> str:
        return next(name for name in ("news", "food", "papers") if self.token >= TOKEN[name])


def list_rows(batch: Batch) -> list[Row]:
    assert batch.predicted.equal(batch.predicted.sort().values)
    assert (batch.input_ids == batch.input_ids[:, :1]).all() and batch.row_weights.bool().all()
    pairs = list(zip(batch.predicted.tolist(), batch.targets.tolist(), strict=True))
    return [
        Row(
            int(ids[0]),
            tuple(batch.corrupted_ids[row].tolist()),
            tuple((place % LENGTH, target) for place, target in pairs if place // LENGTH == row),
        )
        for row, ids in enumerate(batch.input_ids)
    ]


def load(
    corpora: dict[str, TokenBlocks],
    *,
    num_replayed: int,
    size: int = 16,
    micro_batch_size: int = 4,
    rank: int = 0,
    world_size: int = 1,
    collators: dict[str, Collator] | None = None,
    **options: Any,
) -> list[list[Batch]]:
    made = collators or MASKERS
    sources = tuple((corpora[name], made[name]) for name in ("food", "news"))
    samples = SampleDataset(corpora["papers"], made["papers"], 0, "train/papers")
    return list(
        training_steps(
            SingleDomain(samples, size, Replay(num_replayed, sources)),
            global_batch_size=size,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            **{"first_step": 0, "num_steps": NUM_STEPS, **options},
        )
    )


@pytest.mark.parametrize("num_replayed", [1, 3, 8])
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 16), (1, 2), (2, 8), (2, 1), (4, 4), (4, 1), (8, 2)])
def test_replay_independent_of_ranks(
    corpora: dict[str, TokenBlocks], world_size: int, micro_batch_size: int, num_replayed: int
) -> None:
    full = [list_rows(batch) for (batch,) in load(corpora, num_replayed=num_replayed, micro_batch_size=16)]
    ranks = [
        load(corpora, num_replayed=num_replayed, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step, expected in zip(zip(*ranks, strict=True), full, strict=True):
        found = [list_rows(batch) for losses in zip(*step, strict=True) for batch in losses]
        # In the order of the global batch, not only as a set.
        assert [row for rows in found for row in rows] == expected
        assert sum(row.corpus != "papers" for row in expected) == num_replayed
        counts = [sum(row.corpus != "papers" for row in rows) for rows in found]
        assert max(counts) - min(counts) <= 1


def test_replay_round_robin_over_corpora(corpora: dict[str, TokenBlocks]) -> None:
    rows = [row for step in load(corpora, num_replayed=4) for batch in step for row in list_rows(batch)]
    replayed = [row for row in rows if row.corpus != "papers"]
    assert [row.corpus for row in replayed] == ["food", "news"] * (2 * NUM_STEPS)
    assert len({row.token for row in replayed if row.corpus == "news"}) > 8
    own = [row.token for row in rows if row.corpus == "papers"]
    assert sorted(own[:30]) == sorted(own[30:60]) == list(range(5, 35))
    plain = [row for step in load(corpora, num_replayed=0, num_steps=5) for batch in step for row in list_rows(batch)]
    # The domain's own samples are those of a run without replay, corruption included.
    assert [row for row in rows if row.corpus == "papers"] == plain[: len(own)]


def test_replay_repeated_block_has_new_corruption(corpora: dict[str, TokenBlocks]) -> None:
    rows = [row for step in load(corpora, num_replayed=8) for batch in step for row in list_rows(batch)]
    same = [row for row in rows if row.token == TOKEN["food"]]
    assert len({row.corrupted for row in same}) == len(same) > 1


def test_replay_rows_use_their_collator(corpora: dict[str, TokenBlocks]) -> None:
    """Random replacements come from the vocabulary of the row's corpus."""
    rows = [row for step in load(corpora, num_replayed=8) for batch in step for row in list_rows(batch)]
    largest = {name: max(max(row.corrupted) for row in rows if row.corpus == name) for name in MASKERS}
    assert largest["food"] < 300 and largest["news"] < 350 < largest["papers"] < 400
    assert all(target == row.token for row in rows for _, target in row.predicted)
    counts = Counter(row.corpus for row in rows if row.predicted)
    assert set(counts) == set(MASKERS)


@pytest.mark.parametrize(("first_step", "num_workers"), [(1, 0), (4, 0), (6, 0), (0, 2), (3, 2)])
def test_replay_resumed_with_workers(corpora: dict[str, TokenBlocks], first_step: int, num_workers: int) -> None:
    full = load(corpora, num_replayed=3)
    found = load(corpora, num_replayed=3, first_step=first_step, num_workers=num_workers)
    assert len(found) == NUM_STEPS - first_step
    for left, right in zip(found, full[first_step:], strict=True):
        assert [list_rows(batch) for batch in left] == [list_rows(batch) for batch in right]


def test_replay_causal_rows(corpora: dict[str, TokenBlocks]) -> None:
    collators: dict[str, Collator] = dict.fromkeys(NUM_BLOCKS, CausalLMCollator())
    for step in load(corpora, num_replayed=3, collators=collators):
        for batch in step:
            assert batch.corrupted_ids.equal(batch.input_ids)
            for row in list_rows(batch):
                assert row.predicted == tuple((place, row.token) for place in range(LENGTH - 1))


@pytest.mark.parametrize("num_replayed", [0, 3, 15])
def test_replay_marks_rows_and_predictions(corpora: dict[str, TokenBlocks], num_replayed: int) -> None:
    for step in load(corpora, num_replayed=num_replayed, micro_batch_size=2):
        for batch in step:
            replayed = [row for row, found in enumerate(list_rows(batch)) if found.corpus != "papers"]
            assert (batch.replayed_rows is None) == (batch.replayed is None) == (not replayed)
            if batch.replayed_rows is not None and batch.replayed is not None:
                assert batch.replayed_rows.tolist() == replayed
                rows = (batch.predicted // LENGTH).tolist()
                assert batch.replayed.tolist() == [index for index, row in enumerate(rows) if row in replayed]


def test_interleave_moves_position_ids() -> None:
    def made(rows: list[list[int]], predicted: list[int]) -> Batch:
        ids = torch.tensor(rows)
        weights = torch.ones(len(rows))
        return Batch(ids, ids + 100, torch.tensor(predicted), ids.flatten()[predicted], weights, ids * 2)

    joined = interleave([made([[1, 2], [3, 4]], [1, 2]), made([[5, 6]], [0])], [2, 0, 1])
    expected = made([[3, 4], [5, 6], [1, 2]], [0, 2, 5])
    for field in fields(Batch):
        if field.name not in ("replayed_rows", "replayed"):
            assert getattr(joined, field.name).equal(getattr(expected, field.name)), field.name
