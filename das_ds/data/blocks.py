"""Blocks: a corpus as rows of S tokens each, a view of its memory-mapped token files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from das_ds.config import CorpusConfig, DataConfig, DomainConfig, ObjectiveName, SourceConfig
from das_ds.data.objectives import end_of_text
from das_ds.data.sources import find_shared_sources
from das_ds.data.token_file import TokenCorpus
from das_ds.data.tokenize import prepare_tokens
from das_ds.errors import DataError
from das_ds.functional.round_robin import WeightedRoundRobin
from das_ds.user_files import expand_path

CACHE_VARIABLE = "DAS_DS_CACHE"
DEFAULT_CACHE_DIR = "~/.cache/das_ds"


class TokenBlocks:
    """Consecutive blocks of S tokens; tokens after the last full block are dropped."""

    def __init__(
        self,
        tokens: TokenCorpus,
        sequence_length: int,
        first: int = 0,
        stop: int | None = None,
        *,
        document_mask: bool = False,
    ) -> None:
        """Blocks [first, stop) of a corpus; `stop` None: to the end.

        With `document_mask` the blocks know the position of each token in its document.

        Raises:
            DataError: the corpus has less than one block.
        """
        num_blocks = tokens.num_tokens // sequence_length
        if num_blocks == 0:
            raise DataError(
                f"found {tokens.num_tokens} tokens in {tokens.num_documents} documents; expected at least "
                f"{sequence_length}, one block (data.sequence_length)"
            )
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.first = first
        self.stop = num_blocks if stop is None else stop
        assert 0 <= first < self.stop <= num_blocks
        self.document_mask = document_mask

    def __len__(self) -> int:
        return self.stop - self.first

    @property
    def parts(self) -> tuple[TokenBlocks, ...]:
        """The one corpus that they come from."""
        return (self,)

    def part_of(self, number: int) -> range:
        """Indices of the blocks that sample `number` may be."""
        return range(len(self))

    def spread(self, num_blocks: int) -> list[int]:
        """Number of blocks of each part among the first so many samples, each block once."""
        return [min(num_blocks, len(self))]

    def __getitem__(self, index: int) -> Tensor:
        """Block `index`; (S,) long."""
        return self.index_select([index])[0]

    def index_select(self, indices: Sequence[int]) -> Tensor:
        """The blocks with these indices, as `torch.index_select`; (len(indices), S) long.

        Raises:
            IndexError: there is no such block.
        """
        if any(not 0 <= index < len(self) for index in indices):
            raise IndexError(f"found blocks {list(indices)}, expected 0 to {len(self) - 1}")
        begins = [(self.first + index) * self.sequence_length for index in indices]
        return torch.from_numpy(self.tokens.read(begins, self.sequence_length))

    def positions(self, indices: Sequence[int]) -> Tensor | None:
        """Position of every token of these blocks in its document.

        A document that began in an earlier block restarts at 0.

        Returns:
            (len(indices), S) long, or None without document mask.
        """
        if not self.document_mask:
            return None
        length = self.sequence_length
        # Column j of a row: j if a document starts there, else 0; the running maximum is the start of j's document.
        document_starts = np.zeros((len(indices), length), dtype=np.int64)
        for row, index in zip(document_starts, indices, strict=True):
            begin = (self.first + index) * length
            starts = self.tokens.find_starts(begin, begin + length)
            row[starts] = starts
        return torch.from_numpy(np.arange(length) - np.maximum.accumulate(document_starts, axis=1))

    def count_documents(self, num_blocks: int | None = None) -> tuple[int, int]:
        """Tokens, and UTF-8 bytes, of the documents that the first `num_blocks` blocks (None: all) reach into.

        Documents are counted in full, so the first and the last one with what lies outside of the blocks.
        """
        stop = len(self) if num_blocks is None else min(num_blocks, len(self))
        length = self.sequence_length
        return self.tokens.count_documents(self.first * length, (self.first + stop) * length)

    def split(self, num_last: int) -> tuple[Self, Self]:
        """(all but the last `num_last` blocks, the last `num_last` blocks), as views."""
        cut = self.stop - num_last
        return self._slice(self.first, cut), self._slice(cut, self.stop)

    def _slice(self, first: int, stop: int) -> Self:
        return type(self)(self.tokens, self.sequence_length, first, stop, document_mask=self.document_mask)

    def __reduce__(self) -> tuple[partial[Self], tuple[TokenCorpus, int, int, int]]:
        # A loader worker maps the files itself.
        make = partial(type(self), document_mask=self.document_mask)
        return make, (self.tokens, self.sequence_length, self.first, self.stop)


@dataclass(frozen=True)
class MixedBlocks:
    """Blocks of several sources, one after the other, from which samples are drawn in given proportions."""

    names: tuple[str, ...]
    """Of the sources."""
    parts: tuple[TokenBlocks, ...]
    """Blocks of each source."""
    weights: tuple[int, ...]
    """Parts of the samples that come from each source, as integers."""

    def __len__(self) -> int:
        return int(self._bounds[-1])

    @cached_property
    def turns(self) -> WeightedRoundRobin:
        """The source of every sample."""
        return WeightedRoundRobin(self.weights)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Index of the first block of each source."""
        return tuple(self._bounds[:-1].tolist())

    @cached_property
    def _bounds(self) -> NDArray[np.int64]:
        return np.cumsum([0, *map(len, self.parts)])

    def part_of(self, number: int) -> range:
        """Indices of the blocks that sample `number` may be: those of the source whose turn it is."""
        source, _ = self.turns[number]
        return range(self.starts[source], self.starts[source] + len(self.parts[source]))

    def spread(self, num_blocks: int) -> list[int]:
        """Number of blocks of each source among the first so many samples, each block once."""
        return self.turns.capped_counts(min(num_blocks, len(self)), list(map(len, self.parts)))

    def count_documents(self, num_blocks: int | None = None) -> tuple[int, int]:
        """Tokens and bytes of the documents that the first samples reach into, see `TokenBlocks.count_documents`."""
        numbers = self.spread(len(self) if num_blocks is None else num_blocks)
        counts = [part.count_documents(number) for part, number in zip(self.parts, numbers, strict=True) if number]
        return sum(num_tokens for num_tokens, _ in counts), sum(num_bytes for _, num_bytes in counts)

    def index_select(self, indices: Sequence[int]) -> Tensor:
        """The blocks with these indices; (len(indices), S) long."""
        return self._join(indices, [part.index_select(local) for part, local in self._local(indices)])

    def positions(self, indices: Sequence[int]) -> Tensor | None:
        """Position of every token of these blocks in its document, see `TokenBlocks.positions`."""
        found = [part.positions(local) for part, local in self._local(indices)]
        positions = [rows for rows in found if rows is not None]
        return self._join(indices, positions) if positions else None

    def _local(self, indices: Sequence[int]) -> Iterator[tuple[TokenBlocks, list[int]]]:
        """Sources that have some of these blocks, in order, and the indices of the blocks within each."""
        sources = self._sources(indices)
        for source in np.unique(sources):
            local = np.asarray(indices)[sources == source] - self._bounds[source]
            yield self.parts[source], local.tolist()

    def _join(self, indices: Sequence[int], rows: Sequence[Tensor]) -> Tensor:
        """Rows by source, as `_local` gives them, in the order of the indices."""
        order = np.argsort(self._sources(indices), kind="stable")
        return torch.cat(list(rows))[torch.from_numpy(np.argsort(order))]

    def _sources(self, indices: Sequence[int]) -> NDArray[np.int64]:
        return np.searchsorted(self._bounds, np.asarray(indices), side="right") - 1


Blocks = TokenBlocks | MixedBlocks
"""Blocks of one corpus."""


@dataclass(frozen=True)
class CorpusBlocks:
    """Training and held-out blocks of one corpus; `train` is None if the corpus is only evaluated."""

    train: Blocks | None
    valid: Blocks


def resolve_cache_folder(data: DataConfig) -> Path:
    """Folder of tokenized corpora: `data.cache_dir`, else `$DAS_DS_CACHE`, else `~/.cache/das_ds`.

    Raises:
        DataError: the user has no home folder, or `$DAS_DS_CACHE` contains an unset variable.
    """
    try:
        return Path(data.cache_dir or expand_path(os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE_DIR))
    except ValueError as error:
        raise DataError(f"data.cache_dir: {error}") from None


def prepare_corpus(
    corpus: CorpusConfig,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    objective: ObjectiveName,
    progress: bool,
    num_processes: int = 1,
) -> CorpusBlocks:
    """Tokenize a corpus, or find it in the cache, and split it into blocks.

    For causal language modeling every document ends in the end-of-text token.
    Without `corpus.valid` the last `valid_fraction` of the training blocks, at least one, is held out, of every source
    by itself.

    Raises:
        DataError: text that cannot be read, is empty or makes too few blocks; names the corpus.
        ModelError: the tokenizer is not a fast one, or has no end-of-text token (causal).
    """
    ending = end_of_text(tokenizer) if objective == "clm" else None

    def load_blocks(sources: Sequence[str], text_column: str, split: str) -> TokenBlocks:
        name = f"{corpus.name}-{split}"
        tokens = prepare_tokens(
            sources,
            corpus=name,
            text_column=text_column,
            tokenizer=tokenizer,
            cache_dir=resolve_cache_folder(data),
            progress=progress,
            end_of_text=ending,
            num_processes=num_processes,
        )
        try:
            return TokenBlocks(tokens, data.sequence_length, document_mask=data.document_mask)
        except DataError as error:
            raise DataError(f"corpus '{name}': {error}") from error

    check_valid_is_held_out(corpus)
    sources = corpus.training_sources
    train = [
        load_blocks(source.train, source.text_column or corpus.text_column, _split_name("train", source))
        for source in sources
    ]
    if corpus.valid:
        valid: Blocks = load_blocks(corpus.valid, corpus.text_column, "valid")
        return CorpusBlocks(_mix(corpus, train) if train else None, valid)
    halves = [_hold_out(blocks, corpus, source) for blocks, source in zip(train, sources, strict=True)]
    return CorpusBlocks(_mix(corpus, [first for first, _ in halves]), _mix(corpus, [last for _, last in halves]))


def _split_name(split: str, source: SourceConfig) -> str:
    return split if source.name is None else f"{source.name}-{split}"


def _mix(corpus: CorpusConfig, parts: Sequence[TokenBlocks]) -> Blocks:
    if not isinstance(corpus, DomainConfig) or not corpus.sources:
        return parts[0]
    names = [str(source.name) for source in corpus.training_sources]
    return MixedBlocks(tuple(names), tuple(parts), corpus.source_weights)


def check_valid_is_held_out(corpus: CorpusConfig) -> None:
    """Refuse held-out text that is also trained on: its losses would not measure generalization.

    Raises:
        DataError: a source is in both `train` and `valid`, or cannot be found; names the corpus.
    """
    try:
        shared = find_shared_sources(corpus.training_text, corpus.valid)
    except DataError as error:
        raise DataError(f"corpus '{corpus.name}': {error}") from error
    if shared:
        raise DataError(
            f"corpus '{corpus.name}': found {shared[0]} in train and in valid; expected separate held-out text (or no "
            "valid: then valid_fraction of train is held out)"
        )


def _hold_out(train: TokenBlocks, corpus: CorpusConfig, source: SourceConfig) -> tuple[TokenBlocks, TokenBlocks]:
    if len(train) < 2:
        place = "" if source.name is None else f", source '{source.name}'"
        raise DataError(
            f"corpus '{corpus.name}'{place}: found one block of {train.sequence_length} tokens; expected at least "
            f"two, one to train on and one to hold out (or valid text for {corpus.name})"
        )
    num_valid = max(1, round(len(train) * corpus.valid_fraction))
    return train.split(min(num_valid, len(train) - 1))
