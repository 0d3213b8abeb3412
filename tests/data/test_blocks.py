"""Blocks: slices of the brute-force concatenation, held-out part, errors of corpora that are too small."""

import pickle
from pathlib import Path

import pytest
import torch

from das_ds.config import CorpusConfig, DataConfig
from das_ds.data.blocks import TokenBlocks, cache_folder, prepare_corpus
from das_ds.errors import DataError
from tests.helpers.tiny_tokenizer import TEXT, tiny_tokenizer

LENGTH = 16


def all_tokens(text: str = TEXT) -> list[int]:
    tokenizer = tiny_tokenizer()
    return [token for line in text.splitlines() for token in tokenizer(line)["input_ids"]]


def brute_force_blocks(text: str = TEXT) -> list[list[int]]:
    tokens = all_tokens(text)
    return [tokens[i : i + LENGTH] for i in range(0, len(tokens) - LENGTH + 1, LENGTH)]


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return DataConfig(sequence_length=LENGTH, cache_dir=str(tmp_path / "cache"))


def corpus(tmp_path: Path, *, train: str = "", valid: str = "", valid_fraction: float = 0.02) -> CorpusConfig:
    sources: dict[str, list[str]] = {"train": [], "valid": []}
    for part, text in (("train", train), ("valid", valid)):
        if text:
            (tmp_path / f"{part}.txt").write_text(text)
            sources[part] = [str(tmp_path / f"{part}.txt")]
    return CorpusConfig(name="soup", train=sources["train"], valid=sources["valid"], valid_fraction=valid_fraction)


def rows(blocks: TokenBlocks) -> list[list[int]]:
    return [blocks[i].tolist() for i in range(len(blocks))]


@pytest.mark.parametrize(("fraction", "num_valid"), [(0.001, 1), (0.25, None), (0.999, -1)])
def test_valid_is_cut_off_the_end(tmp_path: Path, data: DataConfig, fraction: float, num_valid: int | None) -> None:
    expected = brute_force_blocks()
    cut = {None: len(expected) - round(0.25 * len(expected)), 1: len(expected) - 1, -1: 1}[num_valid]
    blocks = prepare_corpus(
        corpus(tmp_path, train=TEXT, valid_fraction=fraction), data, tiny_tokenizer(), progress=False
    )
    assert blocks.train is not None
    assert rows(blocks.train) == expected[:cut]
    assert rows(blocks.valid) == expected[cut:]


def test_valid_of_its_own(tmp_path: Path, data: DataConfig) -> None:
    valid = "".join(TEXT.splitlines(keepends=True)[:3])
    blocks = prepare_corpus(corpus(tmp_path, train=TEXT, valid=valid), data, tiny_tokenizer(), progress=False)
    assert blocks.train is not None
    assert rows(blocks.train) == brute_force_blocks()
    assert rows(blocks.valid) == brute_force_blocks(valid)


def test_corpus_that_is_only_evaluated(tmp_path: Path, data: DataConfig) -> None:
    blocks = prepare_corpus(corpus(tmp_path, valid=TEXT), data, tiny_tokenizer(), progress=False)
    assert blocks.train is None
    assert rows(blocks.valid) == brute_force_blocks()


def test_take_item_and_copy_agree(tmp_path: Path, data: DataConfig) -> None:
    blocks = prepare_corpus(corpus(tmp_path, train=TEXT, valid_fraction=0.5), data, tiny_tokenizer(), progress=False)
    valid = blocks.valid
    taken = valid.take([2, 0, 2])
    assert taken.dtype == valid[0].dtype == torch.long
    assert torch.equal(taken, torch.stack([valid[2], valid[0], valid[2]]))
    packed = pickle.dumps(valid)
    assert rows(pickle.loads(packed)) == rows(valid)
    assert len(packed) < 500
    with pytest.raises(IndexError):
        valid[len(valid)]


def test_too_small_for_one_block(tmp_path: Path) -> None:
    data = DataConfig(sequence_length=512, cache_dir=str(tmp_path / "cache"))
    found = len(all_tokens("one\ntwo\n"))
    message = rf"corpus 'soup-valid': found {found} tokens in 2 documents; expected at least 512, one block"
    with pytest.raises(DataError, match=message):
        prepare_corpus(corpus(tmp_path, valid="one\ntwo\n"), data, tiny_tokenizer(), progress=False)


def test_too_small_to_hold_out_a_block(tmp_path: Path) -> None:
    data = DataConfig(sequence_length=len(all_tokens()), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"corpus 'soup': found one block .* expected at least two"):
        prepare_corpus(corpus(tmp_path, train=TEXT), data, tiny_tokenizer(), progress=False)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/reader")
    monkeypatch.delenv("DAS_DS_CACHE", raising=False)
    assert cache_folder(DataConfig()) == Path("/home/reader/.cache/das_ds")
    monkeypatch.setenv("DAS_DS_CACHE", "/scratch/tokens")
    assert cache_folder(DataConfig()) == Path("/scratch/tokens")
    assert cache_folder(DataConfig(cache_dir="~/tokens")) == Path("/home/reader/tokens")
