"""Token files: the ids of a corpus in one or several files, memory-mapped and read as one sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from das_ds.data.encoder import UnknownTokens

STARTS_DTYPE = np.dtype("<u8")
MAX_MAPPED_FILES = 256
"""Files that a process keeps mapped; each takes a file descriptor, of which a process often has 1024."""


@dataclass(frozen=True)
class TokenFile:
    """A complete token file: `num_tokens` ids of type `dtype`, from `num_documents` documents."""

    path: Path
    dtype: str
    num_tokens: int
    num_documents: int
    unknown: UnknownTokens = field(default_factory=UnknownTokens)

    @property
    def starts_path(self) -> Path:
        """File of the index of each document's first token, (num_documents,) STARTS_DTYPE, ascending."""
        return self.path.with_name("starts.bin")

    @property
    def sizes_path(self) -> Path:
        """File of the UTF-8 bytes of each document's text, (num_documents,) STARTS_DTYPE."""
        return self.path.with_name("sizes.bin")

    @property
    def is_intact(self) -> bool:
        """Whether the files exist in their full size."""
        token_bytes = self.num_tokens * np.dtype(self.dtype).itemsize
        document_bytes = self.num_documents * STARTS_DTYPE.itemsize
        sizes = {self.path: token_bytes, self.starts_path: document_bytes, self.sizes_path: document_bytes}
        try:
            return all(path.stat().st_size == size for path, size in sizes.items())
        except OSError:
            return False

    @property
    def tokens(self) -> NDArray[np.unsignedinteger]:
        """(num_tokens,) ids."""
        return map_file(self.path, self.dtype)

    @property
    def starts(self) -> NDArray[np.uint64]:
        """(num_documents,) index of each document's first token."""
        return map_file(self.starts_path, STARTS_DTYPE.str)

    @property
    def sizes(self) -> NDArray[np.uint64]:
        """(num_documents,) UTF-8 bytes of each document."""
        return map_file(self.sizes_path, STARTS_DTYPE.str)


@lru_cache(MAX_MAPPED_FILES)
def map_file(path: Path, dtype: str) -> NDArray[np.unsignedinteger]:
    """A file of integers as a read-only memory map; `map_file.cache_clear` after a file was replaced."""
    return np.memmap(path, dtype, "r")


@dataclass(frozen=True)
class TokenCorpus:
    """The tokens of one corpus: those of its token files, one after the other."""

    name: str
    """Name of the cache entry: corpus, and what its text and tokens are."""
    files: tuple[TokenFile, ...]
    """At least one."""
    num_new_tokens: int = field(default=0, compare=False)
    """Tokens that were not in the cache but made in this process or for it."""
    seconds: float = field(default=0.0, compare=False)
    """Wall time that making them took."""

    @property
    def dtype(self) -> str:
        """Of the ids."""
        return self.files[0].dtype

    @cached_property
    def bounds(self) -> NDArray[np.int64]:
        """(number of files + 1,) index of each file's first token, and the number of tokens."""
        return np.cumsum([0, *(file.num_tokens for file in self.files)])

    @property
    def num_tokens(self) -> int:
        """Tokens of all files."""
        return int(self.bounds[-1])

    @property
    def num_documents(self) -> int:
        """Documents of all files."""
        return sum(file.num_documents for file in self.files)

    @property
    def unknown(self) -> UnknownTokens:
        """Unknown tokens of all files."""
        return sum((file.unknown for file in self.files), UnknownTokens())

    def read(self, begins: Sequence[int], length: int) -> NDArray[np.int64]:
        """Rows of tokens.

        Args:
            begins: index of the first token of each row.
            length: tokens per row.

        Returns:
            (len(begins), length) ids.
        """
        rows = np.empty((len(begins), length), dtype=np.int64)
        for row, begin in zip(rows, begins, strict=True):
            for file, first, stop, at in self._overlaps(begin, begin + length):
                row[at : at + stop - first] = file.tokens[first:stop]
        return rows

    def find_starts(self, first: int, stop: int) -> NDArray[np.int64]:
        """The indices in [first, stop) at which a document begins, relative to `first`; ascending."""
        found = [np.empty(0, dtype=np.int64)]
        for file, begin, end, at in self._overlaps(first, stop):
            low, high = np.searchsorted(file.starts, np.array([begin, end], dtype=np.uint64))
            found.append(file.starts[low:high].astype(np.int64) - begin + at)
        return np.concatenate(found)

    def count_documents(self, first: int, stop: int) -> tuple[int, int]:
        """Size of the documents that tokens [first, stop) are of, each counted in full.

        Args:
            first, stop: indices of tokens, first < stop.

        Returns:
            Number of their tokens, and UTF-8 bytes of their text, of which the tokenizer may have dropped some.
        """
        num_tokens = 0
        num_bytes = 0
        for file, begin, end, at in self._overlaps(first, stop):
            # Starts ascend, and equal ones are documents without a token before the one that has it. Those at the end
            # of a file count if the range goes on in the next one.
            low = int(np.searchsorted(file.starts, begin, side="right")) - 1 if at == 0 else 0
            goes_on = at + end - begin < stop - first
            high = len(file.starts) if goes_on else int(np.searchsorted(file.starts, end, side="left"))
            last_token = file.num_tokens if high == len(file.starts) else int(file.starts[high])
            num_tokens += last_token - int(file.starts[low])
            num_bytes += int(file.sizes[low:high].sum())
        return num_tokens, num_bytes

    def _overlaps(self, first: int, stop: int) -> Iterator[tuple[TokenFile, int, int, int]]:
        """Files that have some of the tokens [first, stop): file, range within it, and its place in the range."""
        origin = first
        number = int(np.searchsorted(self.bounds, first, side="right")) - 1
        while first < stop:
            begin = int(self.bounds[number])
            end = min(stop, int(self.bounds[number + 1]))
            if first < end:
                yield self.files[number], first - begin, end - begin, first - origin
                first = end
            number += 1
