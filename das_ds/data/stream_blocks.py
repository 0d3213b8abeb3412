"""Stream blocks: the blocks of a streamed corpus, of which there is no end, read from its windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from das_ds.data.stream_windows import TokenStream
from das_ds.data.token_blocks import TokenBlocks
from das_ds.data.token_file import TokenCorpus, map_file

EXTENT = 1 << 40
"""Indices that the blocks of a stream may have."""
RECENT = 2
"""Windows that stay mapped: a step may need two."""


class StreamBlocks:
    """Blocks of S tokens of a stream: block b is in window b div W, W blocks each.

    Training reads one window after the other. What reads all blocks, or draws some of them, has those of the first
    window, which is `len` of them: samples that methods measure on, and replay.

    Args:
        stream: windows of W x S tokens.
        sequence_length: S.
        document_mask: whether the blocks know the position of each token in its document.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, *, document_mask: bool = False) -> None:
        self.stream = stream
        self.sequence_length = sequence_length
        self.document_mask = document_mask
        self.window_size, rest = divmod(stream.spec.num_tokens, sequence_length)
        assert rest == 0, f"{stream.spec.num_tokens} tokens, {sequence_length} in a block"
        self._recent: list[int] = []

    def __reduce__(self) -> tuple[Callable[..., Self], tuple[TokenStream, int, bool]]:
        return type(self)._make, (self.stream, self.sequence_length, self.document_mask)

    @classmethod
    def _make(cls, stream: TokenStream, sequence_length: int, document_mask: bool) -> Self:
        return cls(stream, sequence_length, document_mask=document_mask)

    def __len__(self) -> int:
        return self.window_size

    @property
    def name(self) -> str:
        """Name of the text and its tokens."""
        return self.stream.spec.name

    @property
    def extent(self) -> int:
        """Indices that blocks may have."""
        return EXTENT

    @property
    def parts(self) -> tuple[StreamBlocks, ...]:
        """The one corpus that they come from."""
        return (self,)

    def part_of(self, number: int) -> range:
        """Indices of the blocks that a replayed sample may be."""
        return range(len(self))

    def spread(self, num_blocks: int) -> list[int]:
        """Number of blocks of each part among so many, each block once."""
        return [min(num_blocks, len(self))]

    def require(self, window: int) -> None:
        """Make a window if it is not there, see `TokenStream.require`."""
        self.stream.require(window)

    def index_select(self, indices: Sequence[int]) -> Tensor:
        """The blocks with these indices; (len(indices), S) long.

        Raises:
            DataError: see `TokenStream.require`.
        """
        return self._gather(indices, lambda blocks, local: blocks.index_select(local))

    def positions(self, indices: Sequence[int]) -> Tensor | None:
        """Position of every token of these blocks in its document, see `TokenBlocks.positions`."""
        if not self.document_mask:
            return None

        def find(blocks: TokenBlocks, local: Sequence[int]) -> Tensor:
            positions = blocks.positions(local)
            assert positions is not None, "the blocks know them"
            return positions

        return self._gather(indices, find)

    def _gather(self, indices: Sequence[int], read: Callable[[TokenBlocks, Sequence[int]], Tensor]) -> Tensor:
        windows, local = np.divmod(np.asarray(indices), self.window_size)
        rows = torch.empty((len(indices), self.sequence_length), dtype=torch.long)
        for window in np.unique(windows):
            mine = windows == window
            rows[torch.from_numpy(mine)] = self._read(int(window), local[mine].tolist(), read)
        return rows

    def _read(
        self, window: int, indices: Sequence[int], read: Callable[[TokenBlocks, Sequence[int]], Tensor]
    ) -> Tensor:
        if window not in self._recent:
            # A window that stays mapped takes disk space also when it was removed.
            map_file.cache_clear()
            self._recent = [*self._recent, window][-RECENT:]
        while True:
            tokens = TokenCorpus(self.name, (self.stream.require(window),))
            blocks = TokenBlocks(tokens, self.sequence_length, document_mask=self.document_mask)
            try:
                return read(blocks, indices)
            except FileNotFoundError:
                # Another run with the same stream has passed the window, and removed it just now.
                continue
