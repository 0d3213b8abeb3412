"""Blocks: slices of the concatenated tokens, held-out blocks, corpora that are too small."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from das_ds.config import CorpusConfig, DataConfig
from das_ds.data.blocks import prepare_corpus, resolve_cache_folder
from das_ds.data.token_blocks import TokenBlocks
from das_ds.data.token_file import TokenCorpus, TokenFile
from das_ds.errors import DataError, ModelError
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
def test_prepare_corpus_holds_out_last_blocks(
    tmp_path: Path, data: DataConfig, fraction: float, num_valid: int | None
) -> None:
    expected = brute_force_blocks()
    cut = {None: len(expected) - round(0.25 * len(expected)), 1: len(expected) - 1, -1: 1}[num_valid]
    blocks = prepare_corpus(
        corpus(tmp_path, train=TEXT, valid_fraction=fraction), data, tiny_tokenizer(), objective="mlm", progress=False
    )
    assert blocks.train is not None
    assert rows(blocks.train) == expected[:cut]
    assert rows(blocks.valid) == expected[cut:]


def test_prepare_corpus_separate_valid(tmp_path: Path, data: DataConfig) -> None:
    valid = "".join(TEXT.splitlines(keepends=True)[:3])
    blocks = prepare_corpus(
        corpus(tmp_path, train=TEXT, valid=valid), data, tiny_tokenizer(), objective="mlm", progress=False
    )
    assert blocks.train is not None
    assert rows(blocks.train) == brute_force_blocks()
    assert rows(blocks.valid) == brute_force_blocks(valid)


def test_prepare_corpus_without_train(tmp_path: Path, data: DataConfig) -> None:
    blocks = prepare_corpus(corpus(tmp_path, valid=TEXT), data, tiny_tokenizer(), objective="mlm", progress=False)
    assert blocks.train is None
    assert rows(blocks.valid) == brute_force_blocks()


def test_blocks_index_select_item_and_pickle_agree(tmp_path: Path, data: DataConfig) -> None:
    blocks = prepare_corpus(
        corpus(tmp_path, train=TEXT, valid_fraction=0.5), data, tiny_tokenizer(), objective="mlm", progress=False
    )
    valid = blocks.valid
    taken = valid.index_select([2, 0, 2])
    assert taken.dtype == valid[0].dtype == torch.long
    assert torch.equal(taken, torch.stack([valid[2], valid[0], valid[2]]))
    packed = pickle.dumps(valid)
    assert rows(pickle.loads(packed)) == rows(valid)
    assert len(packed) < 800
    for index in (len(valid), -1):
        with pytest.raises(IndexError):
            valid[index]


def token_blocks(
    tmp_path: Path, lengths: list[int], sequence_length: int, *, document_mask: bool = True
) -> TokenBlocks:
    """Blocks of documents of the given lengths; all tokens of document d are d."""
    tokens = np.repeat(np.arange(len(lengths)), lengths)
    token_file = TokenFile(tmp_path / "tokens.bin", "<u2", len(tokens), len(lengths))
    tokens.astype("<u2").tofile(token_file.path)
    (np.cumsum(lengths) - lengths).astype("<u8").tofile(token_file.starts_path)
    return TokenBlocks(TokenCorpus("text", (token_file,)), sequence_length, document_mask=document_mask)


def test_count_documents_is_that_of_the_documents_in_the_blocks(tmp_path: Path) -> None:
    """Documents of 3, 5, 4 and 6 tokens, with 10, 20, 30 and 40 bytes, in blocks of 4 tokens."""
    blocks = token_blocks(tmp_path, [3, 5, 4, 6], 4)
    np.array([10, 20, 30, 40]).astype("<u8").tofile(blocks.tokens.files[0].sizes_path)
    # Two tokens of the last document are after the last block, and still counted.
    assert blocks.count_documents() == (18, 100)
    assert blocks.count_documents(1) == blocks.count_documents(2) == (8, 30)
    assert blocks.count_documents(9) == blocks.count_documents()
    # Blocks 1 to 3 begin within the second document.
    train, valid = blocks.split(3)
    assert train.count_documents() == (8, 30)
    assert valid.count_documents(1) == (5, 20)
    assert valid.count_documents() == (15, 90)


def positions_by_hand(row: list[int]) -> list[int]:
    positions: list[int] = []
    for s, token in enumerate(row):
        positions.append(positions[-1] + 1 if s and row[s - 1] == token else 0)
    return positions


LENGTHS = {
    "mixed": [3, 1, 1, 12, 5, 2, 1, 30, 9, 1],
    "single tokens": [1] * 40,
    "one document": [50],
    "borders at blocks": [8, 16, 8, 8],
    "random": np.random.default_rng(0).integers(1, 12, 60).tolist(),
}


@pytest.mark.parametrize("sequence_length", [3, 8, 16])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_positions_restart_at_documents_and_blocks(tmp_path: Path, lengths: list[int], sequence_length: int) -> None:
    blocks = token_blocks(tmp_path, lengths, sequence_length)
    indices = list(range(len(blocks)))[::-1]
    positions = blocks.positions(indices)
    assert positions is not None and positions.dtype == torch.long
    assert positions.tolist() == [positions_by_hand(row) for row in blocks.index_select(indices).tolist()]


def test_positions_of_splits_and_pickles(tmp_path: Path) -> None:
    blocks = token_blocks(tmp_path, LENGTHS["random"], 8)
    full = blocks.positions(range(len(blocks)))
    first, last = blocks.split(3)
    assert full is not None
    for part, expected in ((first, full[:-3]), (last, full[-3:])):
        for copy in (part, pickle.loads(pickle.dumps(part))):
            found = copy.positions(range(len(copy)))
            assert found is not None and torch.equal(found, expected)


def test_positions_without_document_mask_are_none(tmp_path: Path) -> None:
    blocks = token_blocks(tmp_path, [5, 11], 8, document_mask=False)
    assert blocks.positions([0, 1]) is None
    assert all(part.positions([0]) is None for part in (*blocks.split(1), pickle.loads(pickle.dumps(blocks))))


def test_prepare_corpus_causal_ends_documents(tmp_path: Path, data: DataConfig) -> None:
    tokenizer = tiny_tokenizer()
    masked = data.model_copy(update={"document_mask": True})
    blocks = prepare_corpus(corpus(tmp_path, valid=TEXT), masked, tokenizer, objective="clm", progress=False).valid
    # This tokenizer begins every document with <s> and ends it with </s>, which is not doubled.
    assert rows(blocks) == brute_force_blocks()
    positions = blocks.positions(range(len(blocks)))
    assert positions is not None
    starts = torch.tensor(rows(blocks)) == tokenizer.bos_token_id
    starts[:, 0] = True
    assert torch.equal(positions == 0, starts)
    assert ((positions[:, 1:] == positions[:, :-1] + 1) | starts[:, 1:]).all()


def test_prepare_corpus_causal_without_end_of_text_raises(tmp_path: Path, data: DataConfig) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="has no end-of-text token"):
        prepare_corpus(corpus(tmp_path, valid=TEXT), data, tokenizer, objective="clm", progress=False)


def test_prepare_corpus_less_than_a_block_raises(tmp_path: Path) -> None:
    data = DataConfig(sequence_length=512, cache_dir=str(tmp_path / "cache"))
    found = len(all_tokens("one\ntwo\n"))
    message = rf"corpus 'soup-valid': found {found} tokens in 2 documents; expected at least 512, one block"
    with pytest.raises(DataError, match=message):
        prepare_corpus(corpus(tmp_path, valid="one\ntwo\n"), data, tiny_tokenizer(), objective="mlm", progress=False)


def test_prepare_corpus_one_block_raises(tmp_path: Path) -> None:
    data = DataConfig(sequence_length=len(all_tokens()), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"corpus 'soup': found one block .* expected at least two"):
        prepare_corpus(corpus(tmp_path, train=TEXT), data, tiny_tokenizer(), objective="mlm", progress=False)


def test_resolve_cache_folder_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/reader")
    monkeypatch.delenv("DAS_DS_CACHE", raising=False)
    assert resolve_cache_folder(DataConfig()) == Path("/home/reader/.cache/das_ds")
    monkeypatch.setenv("DAS_DS_CACHE", "/scratch/tokens")
    assert resolve_cache_folder(DataConfig()) == Path("/scratch/tokens")
    assert resolve_cache_folder(DataConfig(cache_dir="~/tokens")) == Path("/home/reader/tokens")
