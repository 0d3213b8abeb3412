"""Blocks of a corpus: of one text, of a stream, or of a mixture of several; and how a run prepares them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from das_ds.config import CorpusConfig, DataConfig, DomainConfig, ObjectiveName, SourceConfig
from das_ds.data.objectives import end_of_text
from das_ds.data.sources import find_shared_sources
from das_ds.data.stream_blocks import StreamBlocks
from das_ds.data.stream_windows import open_stream
from das_ds.data.token_blocks import TokenBlocks
from das_ds.data.tokenize import prepare_tokens
from das_ds.errors import DataError
from das_ds.functional.round_robin import WeightedRoundRobin
from das_ds.user_files import expand_path

CACHE_VARIABLE = "DAS_DS_CACHE"
DEFAULT_CACHE_DIR = "~/.cache/das_ds"
AnyBlocks = TypeVar("AnyBlocks", bound=TokenBlocks | StreamBlocks)


@dataclass(frozen=True)
class MixedBlocks:
    """Blocks of several sources, one after the other, from which samples are drawn in given proportions."""

    names: tuple[str, ...]
    """Of the sources."""
    parts: tuple[TokenBlocks | StreamBlocks, ...]
    """Blocks of each source."""
    weights: tuple[int, ...]
    """Parts of the samples that come from each source, as integers."""

    def __len__(self) -> int:
        return sum(map(len, self.parts))

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
        return np.cumsum([0, *(part.extent for part in self.parts)])

    def part_of(self, number: int) -> range:
        """Indices of the blocks that sample `number` may be: those of the source whose turn it is."""
        source, _ = self.turns[number]
        return range(self.starts[source], self.starts[source] + len(self.parts[source]))

    def spread(self, num_blocks: int) -> list[int]:
        """Number of blocks of each source among the first so many samples, each block once."""
        return self.turns.capped_counts(min(num_blocks, len(self)), list(map(len, self.parts)))

    def count_documents(self, num_blocks: int | None = None) -> tuple[int, int]:
        """Tokens and bytes of the documents that the first samples reach into, see `TokenBlocks.count_documents`.

        Only of held-out text, which is not streamed.
        """
        numbers = self.spread(len(self) if num_blocks is None else num_blocks)
        counts = [
            part.count_documents(number)
            for part, number in zip(self.parts, numbers, strict=True)
            if number and isinstance(part, TokenBlocks)
        ]
        return sum(num_tokens for num_tokens, _ in counts), sum(num_bytes for _, num_bytes in counts)

    def index_select(self, indices: Sequence[int]) -> Tensor:
        """The blocks with these indices; (len(indices), S) long."""
        return self._join(indices, [part.index_select(local) for part, local in self._local(indices)])

    def positions(self, indices: Sequence[int]) -> Tensor | None:
        """Position of every token of these blocks in its document, see `TokenBlocks.positions`."""
        found = [part.positions(local) for part, local in self._local(indices)]
        positions = [rows for rows in found if rows is not None]
        return self._join(indices, positions) if positions else None

    def _local(self, indices: Sequence[int]) -> Iterator[tuple[TokenBlocks | StreamBlocks, list[int]]]:
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


Blocks = TokenBlocks | StreamBlocks | MixedBlocks
"""Blocks of one corpus."""


@dataclass(frozen=True)
class CorpusBlocks:
    """Training and held-out blocks of one corpus; `train` is None if the corpus is only evaluated."""

    train: Blocks | None
    valid: TokenBlocks | MixedBlocks


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
    seed: int = 0,
) -> CorpusBlocks:
    """Tokenize a corpus, or find it in the cache, and split it into blocks.

    For causal language modeling every document ends in the end-of-text token.
    Without `corpus.valid` the last `valid_fraction` of the training blocks, at least one, is held out, of every source
    by itself. Training text that is streamed is not read yet.

    Args:
        corpus: files, globs and hub names.
        data: how they are tokenized.
        tokenizer: of the corpus.
        objective: what batches predict.
        progress: show a progress bar.
        num_processes: processes that tokenize; 1: this one.
        seed: of the order of streamed text.

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

    def stream_blocks(sources: Sequence[str], text_column: str, split: str) -> StreamBlocks:
        stream = open_stream(
            sources,
            corpus=f"{corpus.name}-{split}",
            text_column=text_column,
            tokenizer=tokenizer,
            cache_dir=resolve_cache_folder(data),
            end_of_text=ending,
            seed=seed,
            window_tokens=data.shuffle_buffer * data.sequence_length,
        )
        return StreamBlocks(stream, data.sequence_length, document_mask=data.document_mask)

    check_valid_is_held_out(corpus)
    sources = corpus.training_sources
    train: list[TokenBlocks | StreamBlocks] = []
    for source in sources:
        load = stream_blocks if source.streaming else load_blocks
        train.append(load(source.train, source.text_column or corpus.text_column, _split_name("train", source)))
    if corpus.valid:
        valid = load_blocks(corpus.valid, corpus.text_column, "valid")
        return CorpusBlocks(_mix(corpus, train) if train else None, valid)
    halves = [
        _hold_out(blocks, corpus, source)
        for blocks, source in zip(train, sources, strict=True)
        # A stream has no end that could be held out; its config has `valid`.
        if isinstance(blocks, TokenBlocks)
    ]
    return CorpusBlocks(_mix(corpus, [first for first, _ in halves]), _mix(corpus, [last for _, last in halves]))


def _split_name(split: str, source: SourceConfig) -> str:
    return split if source.name is None else f"{source.name}-{split}"


def _mix(corpus: CorpusConfig, parts: Sequence[AnyBlocks]) -> AnyBlocks | MixedBlocks:
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
