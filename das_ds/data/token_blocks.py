"""Token blocks: one corpus as rows of S tokens each, a view of its memory-mapped token files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Self

import numpy as np
import torch
from torch import Tensor

from das_ds.data.token_file import TokenCorpus
from das_ds.errors import DataError


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
    def name(self) -> str:
        """Name of the text and its tokens."""
        return self.tokens.name

    @property
    def extent(self) -> int:
        """Indices that blocks may have."""
        return len(self)

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
