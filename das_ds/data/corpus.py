"""Corpus readers: the documents of a text source, in batches and constant memory.

Files are read line by line, by `json` and by `pyarrow`: never slower than the streaming readers of `datasets` (text
more than ten times faster), and an error can name the byte or line. Hub datasets are streamed by `datasets`.
"""

from __future__ import annotations

import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, NamedTuple

from das_ds.data.parts import SourceRange
from das_ds.data.sources import HubDataset, Source, file_suffix
from das_ds.data.xz_reader import XzReader
from das_ds.errors import DataError, first_line
from das_ds.user_files import NotTextError, UnusableFileError, decode_lines, require_file

CHUNK_BYTES = 1 << 18
ROWS_PER_BATCH = 1000
"""Rows that are read at once; fewer where they are long, so that a batch of rows takes about CHUNK_BYTES."""
HUB_ROWS_PER_BATCH = 100
CORRUPT_ARCHIVE_ERRORS = (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError)


class DocumentBatch(NamedTuple):
    """Documents that are not blank, and the bytes of the file that they came from (0 if unknown)."""

    texts: list[str]
    num_bytes: int


def read_documents(source: Source | SourceRange, text_column: str) -> Iterator[DocumentBatch]:
    """Documents in order: lines of .txt, or the `text_column` of the rows of other formats; blank ones are dropped.

    Memory is bounded by the longest document, of which there are up to four copies at once.

    Args:
        source: a source or a range of it.
        text_column: column with the text in .jsonl, .parquet and hub datasets.

    Raises:
        DataError: an unreadable or corrupt file, text that is not UTF-8, a malformed row, a missing or non-text column,
            or a hub dataset that cannot be streamed.
    """
    piece = source if isinstance(source, SourceRange) else SourceRange(source)
    if isinstance(piece.source, HubDataset):
        batches = _read_hub(piece.source, text_column, piece.first, piece.stop)
    elif file_suffix(piece.source) == ".parquet":
        batches = _read_parquet(piece.source, text_column, piece.first, piece.stop)
    elif file_suffix(piece.source).startswith(".jsonl"):
        batches = _read_jsonl(piece.source, text_column, piece.first, piece.stop)
    else:
        batches = read_lines(piece.source, piece.first, piece.stop)
    for texts, num_bytes in batches:
        yield DocumentBatch([text for text in texts if text and not text.isspace()], num_bytes)


def _decompress(path: Path, file: IO[bytes]) -> Any:
    """Context manager for the decompressed stream of a file."""
    name = path.name.lower()
    if name.endswith(".gz"):
        return gzip.open(file)
    return nullcontext(XzReader(file) if name.endswith(".xz") else file)


def read_lines(path: Path, first: int = 0, stop: int | None = None) -> Iterator[tuple[list[str], int]]:
    """Lines of a text file, compressed or not, in chunks; each with the bytes of the file that it came from.

    A line ends in LF, CR LF or CR, as in Python's text files; a byte-order mark at the beginning is skipped.

    Args:
        path: the file.
        first, stop: bytes of a file that is not compressed, from the beginning of a line to the beginning of another
            one; None: to the end.

    Raises:
        DataError: not a regular file, a Git LFS pointer, unreadable, corrupt, or not UTF-8.
    """
    num_lines = 0
    position = first
    try:
        require_file(path)
        with path.open("rb") as file, _decompress(path, file) as stream:
            file.seek(first)
            for chunk in _split_after_lines(stream, None if stop is None else stop - first):
                # Lines before this range are only counted for a message.
                try:
                    lines = decode_lines(chunk, num_lines, is_first=first == 0 and num_lines == 0)
                except NotTextError:
                    decode_lines(chunk, num_lines + _count_lines(path, first))
                    raise
                # Of the compressed file, also if the stream is decompressed.
                last_position = position
                position = file.tell()
                yield lines, position - last_position
                num_lines += len(lines)
    except NotTextError as error:
        raise DataError(f"{path}, {error.strerror}") from None
    except CORRUPT_ARCHIVE_ERRORS as error:
        raise DataError(f"{path}: damaged archive ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _count_lines(path: Path, stop: int) -> int:
    """Lines in the first `stop` bytes of a file."""
    with path.open("rb") as file:
        return sum(len(decode_lines(chunk)) for chunk in _split_after_lines(file, stop))


def _split_after_lines(stream: IO[bytes], num_bytes: int | None = None) -> Iterator[bytes]:
    """The next bytes of a stream (None: all) in chunks of complete lines, about CHUNK_BYTES each."""
    buffer = bytearray()
    remaining = sys.maxsize if num_bytes is None else num_bytes
    while block := stream.read(min(CHUNK_BYTES, remaining)):
        remaining -= len(block)
        searched = max(0, len(buffer) - 1)
        buffer += block
        # A CR at the very end may be the first half of CR LF.
        cut = 1 + max(buffer.rfind(b"\n", searched), buffer.rfind(b"\r", searched, len(buffer) - 1))
        if cut:
            with memoryview(buffer) as view:
                chunk = bytes(view[:cut])
            del buffer[:cut]
            yield chunk
    if buffer:
        yield bytes(buffer)


def _read_jsonl(path: Path, text_column: str, first: int, stop: int | None) -> Iterator[tuple[list[str], int]]:
    num_lines = 0
    for lines, num_bytes in read_lines(path, first, stop):
        texts: list[str] = []
        for number, line in enumerate(lines, num_lines + 1):
            if not line.strip():
                continue
            try:
                texts.append(_parse_text(line, text_column, str(path)))
            except DataError:
                _parse_text(line, text_column, f"{path}, line {number + _count_lines(path, first)}")
                raise
        yield texts, num_bytes
        num_lines += len(lines)


def parse_json_object(line: str, location: str) -> dict[str, Any]:
    """Parse one line of JSON that contains an object.

    Raises:
        DataError: not JSON or not an object; names `location`.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: not JSON ({error}); expected one object per line") from error
    if not isinstance(row, dict):
        raise DataError(f"{location}: found {type(row).__name__}; expected one object per line")
    return row


def _parse_text(line: str, text_column: str, location: str) -> str:
    row = parse_json_object(line, location)
    _check_column(text_column, row, location)
    return _validate_text(row[text_column], text_column, location)


def _validate_text(value: object, text_column: str, location: str) -> str:
    """The value as a string that UTF-8 can encode; null is an empty document."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{location}: text column '{text_column}' contains {type(value).__name__}; expected text or null"
        )
    check_unicode(value, f"{location}: text column '{text_column}'")
    return value


def check_unicode(text: str, place: str) -> None:
    """Check that UTF-8 can encode a text, as tokenizers do; JSON can also hold halves of characters.

    Raises:
        DataError: it cannot; names the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place} has a lone surrogate; expected Unicode text") from error


def _check_column(text_column: str, columns: Iterable[str], location: str) -> None:
    if text_column not in columns:
        raise DataError(
            f"{location}: no text column '{text_column}'; found columns: {', '.join(columns)} (set text_column to one)"
        )


def _read_parquet(path: Path, text_column: str, first: int, stop: int | None) -> Iterator[tuple[list[str], int]]:
    import pyarrow.parquet as pq

    try:
        require_file(path)
        with pq.ParquetFile(path) as file:
            _check_column(text_column, file.schema_arrow.names, str(path))
            bytes_per_row = path.stat().st_size / max(1, file.metadata.num_rows)
            groups = list(range(file.metadata.num_row_groups))[first:stop]
            num_rows = _rows_per_batch(file.metadata, text_column, groups)
            for batch in file.iter_batches(num_rows, row_groups=groups, columns=[text_column]):
                values = batch.column(0).to_pylist()
                texts = [_validate_text(value, text_column, str(path)) for value in values]
                yield texts, round(len(texts) * bytes_per_row)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: text column '{text_column}' is not UTF-8 ({error})") from error
    except (FileNotFoundError, PermissionError, UnusableFileError) as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    # pyarrow reports corrupt files by errors of many types, OSError among them.
    except Exception as error:
        raise DataError(f"{path}: damaged parquet file ({first_line(error)})") from error


def _rows_per_batch(metadata: Any, text_column: str, groups: Sequence[int]) -> int:
    """Rows whose text takes about CHUNK_BYTES."""
    num_bytes = 0
    num_rows = 0
    for group in map(metadata.row_group, groups):
        columns = map(group.column, range(group.num_columns))
        num_bytes += sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_column)
        num_rows += group.num_rows
    return max(1, min(ROWS_PER_BATCH, CHUNK_BYTES * num_rows // max(num_bytes, 1)))


def count_hub_shards(source: HubDataset) -> int:
    """Shards, usually files, that a hub dataset can be read by.

    Raises:
        DataError: it cannot be streamed.
    """
    with _name_hub_errors(source):
        return int(_open_hub(source).num_shards)


def _read_hub(
    source: HubDataset, text_column: str, first: int = 0, stop: int | None = None
) -> Iterator[tuple[list[str], int]]:
    """Texts of shards [first, stop); `stop` None: to the end."""
    with _name_hub_errors(source):
        stream = _open_hub(source)
        if stop is None:
            streams = [stream]
        else:
            streams = [stream.shard(num_shards=stream.num_shards, index=index) for index in range(first, stop)]
        for rows in (rows for one in streams for rows in one.iter(batch_size=HUB_ROWS_PER_BATCH)):
            _check_column(text_column, rows, str(source))
            yield [_validate_text(value, text_column, str(source)) for value in rows[text_column]], 0


def _open_hub(source: HubDataset) -> Any:
    import datasets

    return datasets.load_dataset(
        source.repo, source.config, split=source.split, revision=source.revision, streaming=True
    )


@contextmanager
def _name_hub_errors(source: HubDataset) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    # A hub dataset may raise the error of any format reader or HTTP library.
    except Exception as error:
        raise DataError(f"{source}: hub dataset cannot be streamed ({type(error).__name__}: {error})") from error
