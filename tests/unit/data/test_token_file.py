"""Token files of one corpus read as one sequence, compared with numpy on the joined tokens."""

from pathlib import Path

import numpy as np
import pytest

from das_ds.data import token_file
from das_ds.data.token_file import TokenCorpus, TokenFile, map_file

LENGTHS = ([3, 5], [10], [0, 1, 2, 0, 4], [6])
"""Tokens of the documents of each file."""
TOKENS = np.arange(sum(map(sum, LENGTHS)), dtype=np.int64)
STARTS = np.cumsum([0, *(length for lengths in LENGTHS for length in lengths)])[:-1]


@pytest.fixture
def corpus(tmp_path: Path) -> TokenCorpus:
    files = []
    first = 0
    for number, lengths in enumerate(LENGTHS):
        folder = tmp_path / str(number)
        folder.mkdir()
        file = TokenFile(folder / "tokens.bin", "<u2", sum(lengths), len(lengths))
        TOKENS[first : first + sum(lengths)].astype("<u2").tofile(file.path)
        (np.cumsum(lengths) - lengths).astype("<u8").tofile(file.starts_path)
        np.array([10 * length + 1 for length in lengths]).astype("<u8").tofile(file.sizes_path)
        files.append(file)
        first += sum(lengths)
    return TokenCorpus("text", tuple(files))


def test_corpus_is_the_joined_files(corpus: TokenCorpus) -> None:
    assert (corpus.num_tokens, corpus.num_documents) == (len(TOKENS), len(STARTS))
    assert all(file.is_intact for file in corpus.files)
    for length in (1, 4, 13, len(TOKENS)):
        begins = list(range(len(TOKENS) - length + 1))
        expected = np.stack([TOKENS[begin : begin + length] for begin in begins])
        assert (corpus.read(begins, length) == expected).all()


def test_find_starts_and_count_documents_span_files(corpus: TokenCorpus) -> None:
    stops = np.append(STARTS[1:], len(TOKENS))
    for first in range(len(TOKENS)):
        for stop in range(first + 1, len(TOKENS) + 1):
            inside = STARTS[(first <= STARTS) & (stop > STARTS)]
            # A document without a token is at the place of the next one.
            assert set((corpus.find_starts(first, stop) + first).tolist()) == set(inside.tolist())
            # Documents without a token count if they are within the range.
            touched = [d for d in range(len(STARTS)) if STARTS[d] < stop and stops[d] > first]
            num_tokens = sum(int(stops[d] - STARTS[d]) for d in touched)
            num_bytes = sum(10 * int(stops[d] - STARTS[d]) + 1 for d in touched)
            assert corpus.count_documents(first, stop) == (num_tokens, num_bytes)


def test_mapped_files_are_bounded(corpus: TokenCorpus) -> None:
    map_file.cache_clear()
    for _ in range(3):
        corpus.read([0], len(TOKENS))
    info = map_file.cache_info()
    assert info.maxsize == token_file.MAX_MAPPED_FILES and info.misses == len(LENGTHS)
