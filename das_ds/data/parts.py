"""Parts: a corpus divided into ranges of its sources that are tokenized, and cached, by themselves.

The division depends on the text only, so that any number of processes makes the same token files and a later start
finds those that are done. Small sources share a part; a text file is divided at ends of lines and a parquet file at row
groups. Compressed files cannot be read from the middle, and splits of hub datasets have files of unknown sizes: each is
one part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from das_ds.data.sources import Source, file_suffix
from das_ds.errors import DataError
from das_ds.user_files import UnusableFileError, require_file

PART_BYTES = 64 << 20
"""Bytes of text in a part; a part has at least one line, row group or compressed file."""
SEARCH_BYTES = 1 << 16


@dataclass(frozen=True)
class SourceRange:
    """A range of a source: bytes of a text file, row groups of a parquet file, shards of a hub dataset."""

    source: Source
    first: int = 0
    stop: int | None = None
    """None: to the end."""
    num_bytes: int = 0
    """Bytes of the file in it; 0 if unknown."""


Part = tuple[SourceRange, ...]
"""Ranges that are tokenized together, in order."""


def divide_sources(sources: Sequence[Source]) -> list[Part]:
    """All of the sources, in order, in parts of about PART_BYTES.

    Raises:
        DataError: a file cannot be read.
    """
    parts: list[Part] = []
    current: list[SourceRange] = []
    for piece in (piece for source in sources for piece in divide_source(source)):
        if current and sum(one.num_bytes for one in current) + piece.num_bytes > PART_BYTES:
            parts.append(tuple(current))
            current = []
        current.append(piece)
    return [*parts, tuple(current)] if current else parts


def divide_source(source: Source) -> list[SourceRange]:
    """All of one source, in order, in ranges of about PART_BYTES; a hub dataset is one.

    Raises:
        DataError: a file cannot be read.
    """
    if not isinstance(source, Path):
        return [SourceRange(source, num_bytes=0)]
    try:
        require_file(source)
        num_bytes = source.stat().st_size
        suffix = file_suffix(source)
        if num_bytes <= PART_BYTES or suffix.endswith((".gz", ".xz")):
            return [SourceRange(source, num_bytes=num_bytes)]
        if suffix == ".parquet":
            return _divide_row_groups(source)
        bounds = [0, *_find_line_starts(source, range(PART_BYTES, num_bytes, PART_BYTES)), num_bytes]
        return [SourceRange(source, first, stop, stop - first) for first, stop in pairwise(bounds) if first < stop]
    except UnusableFileError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror})") from error
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror or error})") from error


def _divide_row_groups(path: Path) -> list[SourceRange]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        with pq.ParquetFile(path) as file:
            metadata = file.metadata
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
            sizes = [
                sum(group.column(number).total_compressed_size for number in range(group.num_columns))
                for group in groups
            ]
    # The reader reports what is damaged.
    except (ArrowException, ValueError):
        return [SourceRange(path, num_bytes=path.stat().st_size)]
    pieces: list[SourceRange] = []
    first = 0
    for stop in range(1, len(sizes) + 1):
        if stop == len(sizes) or sum(sizes[first : stop + 1]) > PART_BYTES:
            pieces.append(SourceRange(path, first, stop, sum(sizes[first:stop])))
            first = stop
    return pieces


def _find_line_starts(path: Path, positions: Sequence[int]) -> Iterator[int]:
    """For each position of a text file the first beginning of a line at or after it."""
    with path.open("rb") as file:
        for position in positions:
            file.seek(position - 1)
            yield position - 1 + _skip_line(iter(lambda: file.read(SEARCH_BYTES), b""))


def _skip_line(blocks: Iterator[bytes]) -> int:
    """Bytes up to the end of the line that goes on in these blocks; a line ends in LF, CR LF or CR."""
    num_bytes = 0
    for block in blocks:
        ends = [place for place in (block.find(b"\n"), block.find(b"\r")) if place >= 0]
        if not ends:
            num_bytes += len(block)
            continue
        place = min(ends)
        num_bytes += place + 1
        if block[place : place + 1] == b"\r":
            following = block[place + 1 : place + 2] or next(blocks, b"")[:1]
            num_bytes += following == b"\n"
        return num_bytes
    return num_bytes
