"""A domain of several sources: blocks, order, subsets and replay against what is counted by hand."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from das_ds.config import DataConfig, DomainConfig, SourceConfig
from das_ds.data.batch import Batch
from das_ds.data.blocks import MixedBlocks, prepare_corpus
from das_ds.data.loader import SampleDataset, evaluation_batches, training_steps
from das_ds.data.mixture import SingleDomain
from das_ds.data.objectives import MLMCollator
from das_ds.data.replay import Replay
from das_ds.data.subsets import first_blocks, random_subset
from das_ds.data.token_blocks import TokenBlocks
from das_ds.data.token_file import TokenCorpus, TokenFile
from das_ds.errors import DataError
from helpers.tiny_tokenizer import tiny_tokenizer

LENGTH = 16
GLOBAL_BATCH = 8
NUM_STEPS = 30
FIRST_TOKEN = {"large": 100, "small": 200, "tiny": 300}
"""Block i of a source contains only its token + i."""
NUM_BLOCKS = {"large": 90, "small": 12, "tiny": 3}
WEIGHTS = (5, 4, 1)
MASKER = MLMCollator(4, (0, 1, 2, 3, 4), 400, 0.3)


def token_blocks(folder: Path, name: str, *, document_mask: bool = False) -> TokenBlocks:
    count = NUM_BLOCKS[name]
    path = folder / name / "tokens.bin"
    path.parent.mkdir(exist_ok=True)
    np.repeat(np.arange(FIRST_TOKEN[name], FIRST_TOKEN[name] + count), LENGTH).astype("<u2").tofile(path)
    # A document begins with every block, and one in the middle of each block of `small`.
    step = LENGTH // 2 if name == "small" else LENGTH
    starts = np.arange(0, count * LENGTH, step)
    starts.astype("<u8").tofile(path.with_name("starts.bin"))
    return TokenBlocks(
        TokenCorpus("text", (TokenFile(path, "<u2", count * LENGTH, len(starts)),)), LENGTH, document_mask=document_mask
    )


@pytest.fixture
def blocks(tmp_path: Path) -> MixedBlocks:
    return MixedBlocks(tuple(NUM_BLOCKS), tuple(token_blocks(tmp_path, name) for name in NUM_BLOCKS), WEIGHTS)


def source_of(token: int) -> str:
    return next(name for name in reversed(FIRST_TOKEN) if token >= FIRST_TOKEN[name])


def load(
    blocks: MixedBlocks,
    *,
    micro_batch_size: int = GLOBAL_BATCH,
    rank: int = 0,
    world_size: int = 1,
    first_step: int = 0,
    num_workers: int = 0,
) -> list[list[tuple[int, ...]]]:
    """Step -> rows of this rank, see `_rows`."""
    steps = training_steps(
        SingleDomain(SampleDataset(blocks, MASKER, 0, "train/medical"), GLOBAL_BATCH),
        first_step=first_step,
        num_steps=NUM_STEPS,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
    )
    return [[row for batch in step for row in _rows(batch)] for step in steps]


def _rows(batch: Batch) -> list[tuple[int, ...]]:
    """The token of each row's block, and the input of the model."""
    seen = zip(batch.input_ids[:, 0].tolist(), batch.corrupted_ids.tolist(), strict=True)
    return [(token, *corrupted) for token, corrupted in seen]


def test_mixed_blocks_are_the_sources_one_after_the_other(blocks: MixedBlocks) -> None:
    assert len(blocks) == 105 and blocks.starts == (0, 90, 102)
    indices = [104, 0, 90, 89, 101, 102, 3]
    expected = [302, 100, 200, 189, 211, 300, 103]
    for one in (blocks, pickle.loads(pickle.dumps(blocks))):
        rows = one.index_select(indices)
        assert rows.shape == (7, LENGTH) and rows[:, 0].tolist() == expected
        assert (rows == rows[:, :1]).all()
    assert blocks.positions(indices) is None


def test_mixed_blocks_have_positions_in_documents(tmp_path: Path) -> None:
    parts = tuple(token_blocks(tmp_path, name, document_mask=True) for name in NUM_BLOCKS)
    positions = MixedBlocks(tuple(NUM_BLOCKS), parts, WEIGHTS).positions([92, 1, 104])
    assert positions is not None
    whole = list(range(LENGTH))
    assert positions.tolist() == [whole[: LENGTH // 2] * 2, whole, whole]


def test_count_documents_has_the_first_samples_of_every_source(blocks: MixedBlocks) -> None:
    """Ten samples are 5, 4 and 1 blocks; a document of `large` has 7 bytes, of `small` 9, of `tiny` 11."""
    for part, num_bytes in zip(blocks.parts, (7, 9, 11), strict=True):
        np.full(part.tokens.num_documents, num_bytes).astype("<u8").tofile(part.tokens.files[0].sizes_path)
    assert blocks.count_documents(10) == (10 * LENGTH, 5 * 7 + 4 * 2 * 9 + 1 * 11)
    assert blocks.count_documents() == (105 * LENGTH, 90 * 7 + 24 * 9 + 3 * 11)


def test_mixture_has_its_proportions_in_every_window(blocks: MixedBlocks) -> None:
    names = [source_of(row[0]) for step in load(blocks) for row in step]
    for length in range(1, len(names) + 1, 3):
        for begin in range(0, len(names) - length + 1, 5):
            counts = Counter(names[begin : begin + length])
            for name, weight in zip(NUM_BLOCKS, WEIGHTS, strict=True):
                assert abs(counts[name] - length * weight / 10) < 2, (begin, length)
    assert Counter(names) == {"large": 120, "small": 96, "tiny": 24}


def test_exhausted_source_begins_its_next_shuffled_epoch(blocks: MixedBlocks) -> None:
    """Every epoch of a source has each of its blocks once, in another order, with other predictions."""
    rows = [row for step in load(blocks) for row in step]
    for name, count in NUM_BLOCKS.items():
        mine = [row for row in rows if source_of(row[0]) == name]
        epochs = [[row[0] for row in mine[start : start + count]] for start in range(0, len(mine) - count + 1, count)]
        assert all(sorted(epoch) == list(range(FIRST_TOKEN[name], FIRST_TOKEN[name] + count)) for epoch in epochs)
        assert len(mine) >= count
        if name != "tiny":
            assert all(first != second for first, second in pairwise(epochs))
    assert len(set(rows)) > 0.95 * len(rows)


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 2), (2, 4), (2, 1), (4, 2)])
def test_mixture_is_independent_of_ranks(blocks: MixedBlocks, world_size: int, micro_batch_size: int) -> None:
    ranks = [
        load(blocks, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for step, expected in enumerate(load(blocks)):
        starts = range(0, GLOBAL_BATCH // world_size, micro_batch_size)
        found = [row for start in starts for mine in ranks for row in mine[step][start : start + micro_batch_size]]
        assert found == expected


@pytest.mark.parametrize(("first_step", "num_workers"), [(1, 0), (17, 0), (NUM_STEPS, 0), (5, 2)])
def test_mixture_resumes_by_position(blocks: MixedBlocks, first_step: int, num_workers: int) -> None:
    assert load(blocks, first_step=first_step, num_workers=num_workers) == load(blocks)[first_step:]


@pytest.mark.parametrize("size", [1, 10, 29, 30, 31, 60, 104, 105, 1000])
def test_subsets_have_the_proportions_while_sources_last(blocks: MixedBlocks, size: int) -> None:
    """Of 10 blocks 5, 4 and 1; after 30 the smallest source is exhausted, and the others share the rest."""
    drawn = random_subset(blocks, size, 0)
    first = list(first_blocks(blocks, size))
    assert drawn == sorted(set(drawn)) and first == sorted(set(first)) and len(drawn) == len(first) == min(size, 105)
    counts = [Counter(_source(blocks, index) for index in chosen) for chosen in (drawn, first)]
    assert counts[0] == counts[1]
    if size <= 30:
        assert all(abs(counts[0][name] - size * w / 10) < 1 for name, w in zip(NUM_BLOCKS, WEIGHTS, strict=True))
    elif size < 105:
        assert counts[0]["tiny"] == 3
    if size < 105:
        kept = {name: [i for i in first if _source(blocks, i) == name] for name in NUM_BLOCKS}
        starts = dict(zip(NUM_BLOCKS, blocks.starts, strict=True))
        assert all(indices == list(range(starts[name], starts[name] + len(indices))) for name, indices in kept.items())
    assert size < 10 or size >= 105 or random_subset(blocks, size, 1) != drawn


def _source(blocks: MixedBlocks, index: int) -> str:
    return source_of(int(blocks.index_select([index])[0, 0]))


def test_evaluation_of_a_part_has_all_sources(blocks: MixedBlocks) -> None:
    batches = evaluation_batches(
        blocks, MASKER, seed=0, stream="evaluation/x", batch_size=4, rank=0, world_size=1, max_sequences=20
    )
    rows = [int(row[0]) for batch in batches for row in batch.input_ids[batch.row_weights > 0]]
    assert Counter(map(source_of, rows)) == {"large": 10, "small": 8, "tiny": 2}


def test_replayed_mixture_keeps_its_proportions(blocks: MixedBlocks) -> None:
    replay = Replay(3, ((blocks, MASKER), (blocks.parts[0], MASKER)))
    refs = [replay.ref(number, 0, "train/x") for number in range(200)]
    mixed = [ref.block for ref in refs if ref.source == 1]
    assert len(mixed) == 100
    assert Counter(_source(blocks, block) for block in mixed) == {"large": 50, "small": 40, "tiny": 10}
    assert all(ref.block < 90 for ref in refs if ref.source == 2)
    assert len(set(mixed)) > 40


def corpus(folder: Path, **changes: object) -> DomainConfig:
    sources = []
    for name, weight in (("abstracts", 0.7), ("notes", 0.3)):
        (folder / f"{name}.txt").write_text(f"{name} of twelve weeks\n" * (90 if name == "abstracts" else 30))
        sources.append({"name": name, "train": [str(folder / f"{name}.txt")], "weight": weight})
    return DomainConfig.model_validate({"name": "medical", "sources": sources, "valid_fraction": 0.1, **changes})


def prepare(folder: Path, config: DomainConfig) -> tuple[MixedBlocks, TokenBlocks | MixedBlocks]:
    data = DataConfig(sequence_length=LENGTH, cache_dir=str(folder / "cache"))
    made = prepare_corpus(config, data, tiny_tokenizer(), objective="mlm", progress=False)
    assert isinstance(made.train, MixedBlocks)
    return made.train, made.valid


def test_prepare_corpus_holds_out_of_every_source(tmp_path: Path) -> None:
    train, valid = prepare(tmp_path, corpus(tmp_path))
    assert isinstance(valid, MixedBlocks)
    assert train.names == valid.names == ("abstracts", "notes") and train.weights == valid.weights == (7, 3)
    for kept, held in zip(train.parts, valid.parts, strict=True):
        assert kept.tokens == held.tokens and kept.stop == held.first
        assert len(held) == max(1, round((len(kept) + len(held)) * 0.1))
    # A source is a cache entry of its own, which another domain or weight does not change.
    assert sorted(path.name.rpartition("-")[0] for path in (tmp_path / "cache").glob("*.json")) == [
        "medical-abstracts-train",
        "medical-notes-train",
    ]


def test_prepare_corpus_with_held_out_text_trains_on_all_of_the_sources(tmp_path: Path) -> None:
    (tmp_path / "valid.txt").write_text("held out for good\n" * 30)
    train, valid = prepare(tmp_path, corpus(tmp_path, valid=[str(tmp_path / "valid.txt")]))
    assert isinstance(valid, TokenBlocks) and [part.first for part in train.parts] == [0, 0]
    alone, _ = prepare(tmp_path, corpus(tmp_path))
    assert len(train) > len(alone)


def test_prepare_corpus_errors_name_the_source(tmp_path: Path) -> None:
    config = corpus(tmp_path)
    with pytest.raises(DataError, match=r"corpus 'medical': found .*notes.txt in train and in valid"):
        prepare(tmp_path, config.model_copy(update={"valid": [str(tmp_path / "notes.txt")]}))
    (tmp_path / "notes.txt").write_text("twelve weeks later\n" * 2)
    with pytest.raises(DataError, match=r"corpus 'medical', source 'notes': found one block of 16 tokens; expected at"):
        prepare(tmp_path, config)
    missing = SourceConfig(name="gone", train=[str(tmp_path / "gone.txt")], weight=1)
    with pytest.raises(DataError, match=r"corpus 'medical': .*gone.txt: found no such file"):
        prepare(tmp_path, config.model_copy(update={"sources": [missing]}))
