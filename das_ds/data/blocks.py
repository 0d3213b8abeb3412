"""Blocks of a fixed number of tokens, as a memory-mapped view of a token file; S = tokens per block."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from das_ds.config import CorpusConfig, DataConfig
from das_ds.data.tokenise import TokenFile, prepare_tokens
from das_ds.errors import DataError

CACHE_VARIABLE = "DAS_DS_CACHE"
DEFAULT_CACHE_DIR = "~/.cache/das_ds"


class TokenBlocks:
    """Consecutive blocks of S tokens; the tokens after the last whole block are left out."""

    def __init__(self, token_file: TokenFile, sequence_length: int, first: int = 0, stop: int | None = None) -> None:
        """Blocks `first` to `stop` (all from `first` where None) of a token file that holds at least one.

        Raises:
            DataError: the file holds less than one block.
        """
        num_blocks = token_file.num_tokens // sequence_length
        if num_blocks == 0:
            raise DataError(
                f"found {token_file.num_tokens} tokens in {token_file.num_documents} documents; expected at least "
                f"{sequence_length}, one block (data.sequence_length)"
            )
        self.token_file = token_file
        self.sequence_length = sequence_length
        self.first = first
        self.stop = num_blocks if stop is None else stop
        assert 0 <= first < self.stop <= num_blocks
        shape = (num_blocks, sequence_length)
        self._blocks = np.memmap(token_file.path, token_file.dtype, "r", shape=shape)[first : self.stop]

    def __len__(self) -> int:
        return self.stop - self.first

    def __getitem__(self, index: int) -> Tensor:
        """Block `index`; (S,) long."""
        return torch.from_numpy(self._blocks[index].astype(np.int64))

    def take(self, indices: Sequence[int]) -> Tensor:
        """The blocks of the given indices; (len(indices), S) long."""
        return torch.from_numpy(self._blocks[list(indices)].astype(np.int64))

    def split(self, num_last: int) -> tuple[Self, Self]:
        """Views of all but the last `num_last` blocks and of those."""
        cut = self.stop - num_last
        make = type(self)
        return (
            make(self.token_file, self.sequence_length, self.first, cut),
            make(self.token_file, self.sequence_length, cut, self.stop),
        )

    def __reduce__(self) -> tuple[type[Self], tuple[TokenFile, int, int, int]]:
        # A loader process maps the file itself; a pickled memory map would carry its whole content.
        return type(self), (self.token_file, self.sequence_length, self.first, self.stop)


@dataclass(frozen=True)
class CorpusBlocks:
    """Training and held-out blocks of one corpus; `train` is None for a corpus that is only evaluated."""

    train: TokenBlocks | None
    valid: TokenBlocks


def cache_folder(data: DataConfig) -> Path:
    """Folder of tokenised corpora: `data.cache_dir`, else `$DAS_DS_CACHE`, else `~/.cache/das_ds`."""
    return Path(data.cache_dir or os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE_DIR).expanduser()


def prepare_corpus(
    corpus: CorpusConfig, data: DataConfig, tokenizer: PreTrainedTokenizerBase, *, progress: bool
) -> CorpusBlocks:
    """Tokenise a corpus, or find it in the cache, and cut it into blocks.

    Without `corpus.valid` the last `valid_fraction` of the training blocks, at least one, is held out.

    Raises:
        DataError: text that cannot be read, is empty or makes too few blocks; names the corpus.
        ModelError: the tokeniser is not a fast one.
    """

    def blocks(sources: Sequence[str], part: str) -> TokenBlocks:
        name = f"{corpus.name}-{part}"
        tokens = prepare_tokens(
            sources,
            corpus=name,
            text_column=corpus.text_column,
            tokenizer=tokenizer,
            cache_dir=cache_folder(data),
            progress=progress,
        )
        try:
            return TokenBlocks(tokens, data.sequence_length)
        except DataError as error:
            raise DataError(f"corpus '{name}': {error}") from error

    train = blocks(corpus.train, "train") if corpus.train else None
    if corpus.valid:
        return CorpusBlocks(train, blocks(corpus.valid, "valid"))
    assert train is not None
    return CorpusBlocks(*_hold_out(train, corpus))


def _hold_out(train: TokenBlocks, corpus: CorpusConfig) -> tuple[TokenBlocks, TokenBlocks]:
    if len(train) < 2:
        raise DataError(
            f"corpus '{corpus.name}': found one block of {train.sequence_length} tokens; expected at least two, one to "
            f"train on and one to hold out (or give {corpus.name} its own valid text)"
        )
    num_valid = max(1, round(len(train) * corpus.valid_fraction))
    return train.split(min(num_valid, len(train) - 1))
