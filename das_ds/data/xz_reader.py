"""Reader of .xz files that reads all of a file or raises: `lzma.open` ends without a word where one of several streams
that were joined, or what is between two of them, is no beginning of a stream."""

from __future__ import annotations

import lzma
from typing import IO

BLOCK_BYTES = 1 << 16
PADDING_UNIT = 4
"""Streams may be followed by zeros, in multiples of as many bytes (section 2.2 of the .xz file format)."""


class XzReader:
    """The decompressed bytes of a file.

    Args:
        file: at its beginning.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decompressor = lzma.LZMADecompressor()

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size` > 0; b"" at the end of the file.

        Raises:
            LZMAError: the file is damaged, or has something else after a stream.
            EOFError: it ends within a stream.
        """
        while True:
            compressed = b""
            if self._decompressor.eof:
                compressed = self._skip_padding()
                if not compressed:
                    return b""
                self._decompressor = lzma.LZMADecompressor()
            elif self._decompressor.needs_input:
                compressed = self._file.read(BLOCK_BYTES)
                if not compressed:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            if data := self._decompressor.decompress(compressed, size):
                return data

    def _skip_padding(self) -> bytes:
        """The beginning of the next stream; b"" if there is none."""
        num_zeros = 0
        block = self._decompressor.unused_data or self._file.read(BLOCK_BYTES)
        while True:
            rest = block.lstrip(b"\0")
            num_zeros += len(block) - len(rest)
            if rest or not block:
                break
            block = self._file.read(BLOCK_BYTES)
        if num_zeros % PADDING_UNIT:
            raise lzma.LZMAError(f"found {num_zeros} zeros after a stream, expected a multiple of {PADDING_UNIT}")
        return rest
