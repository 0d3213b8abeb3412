"""Documents of a text source, in batches and constant memory.

Files are read by a plain line reader, `json` and `pyarrow`: never slower than the streaming readers of `datasets`
(text over ten times faster), and an error can name its byte or line. Hub datasets are streamed by `datasets`.
"""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any, NamedTuple

from das_ds.data.sources import HubDataset, Source, file_suffix
from das_ds.errors import DataError, first_line
from das_ds.user_files import NotTextError, UnusableFileError, decode_lines, require_file

CHUNK_BYTES = 1 << 18
ROWS_PER_BATCH = 1000
DAMAGE = (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError)


class DocumentBatch(NamedTuple):
    """Documents without the blank ones, and how many bytes of the file they took (0 where that is unknown)."""

    texts: list[str]
    num_bytes: int


def read_documents(source: Source, text_column: str) -> Iterator[DocumentBatch]:
    """Documents in order: one per line of .txt, one per row's `text_column` elsewhere; blank ones are dropped.

    Raises:
        DataError: unreadable or damaged file, text that is not UTF-8, malformed row, missing or non-text column,
            hub dataset that cannot be streamed.
    """
    if isinstance(source, HubDataset):
        batches = _read_hub(source, text_column)
    elif file_suffix(source) == ".parquet":
        batches = _read_parquet(source, text_column)
    elif file_suffix(source).startswith(".jsonl"):
        batches = _read_jsonl(source, text_column)
    else:
        batches = read_lines(source)
    for texts, num_bytes in batches:
        yield DocumentBatch([text for text in texts if text and not text.isspace()], num_bytes)


def _unpacked(path: Path, file: IO[bytes]) -> Any:
    name = path.name.lower()
    if name.endswith(".gz"):
        return gzip.open(file)
    return lzma.open(file) if name.endswith(".xz") else nullcontext(file)


def read_lines(path: Path) -> Iterator[tuple[list[str], int]]:
    """Lines of a file of text, packed or not, in chunks, each with the bytes of the file that it took.

    A line ends in LF, CR LF or CR, as in Python's own text files; a byte-order mark at the beginning is no part of it.

    Raises:
        DataError: no regular file, a Git LFS pointer, unreadable, damaged, or text that is not UTF-8.
    """
    num_lines = position = 0
    try:
        require_file(path)
        with path.open("rb") as file, _unpacked(path, file) as stream:
            for block in _whole_lines(stream):
                lines = decode_lines(block, num_lines)
                last, position = position, file.tell()
                yield lines, position - last
                num_lines += len(lines)
    except NotTextError as error:
        raise DataError(f"{path}, {error.strerror}") from None
    except DAMAGE as error:
        raise DataError(f"{path}: damaged archive ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _whole_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """The bytes of a stream, cut behind ends of lines, about CHUNK_BYTES at a time."""
    buffer = bytearray()
    while chunk := stream.read(CHUNK_BYTES):
        searched = max(0, len(buffer) - 1)
        buffer += chunk
        # A CR that stands last may be the first half of CR LF.
        cut = 1 + max(buffer.rfind(b"\n", searched), buffer.rfind(b"\r", searched, len(buffer) - 1))
        if cut:
            yield bytes(buffer[:cut])
            del buffer[:cut]
    if buffer:
        yield bytes(buffer)


def _read_jsonl(path: Path, text_column: str) -> Iterator[tuple[list[str], int]]:
    num_lines = 0
    for lines, num_bytes in read_lines(path):
        rows = enumerate(lines, num_lines + 1)
        yield (
            [_json_text(line, text_column, f"{path}, line {number}") for number, line in rows if line.strip()],
            num_bytes,
        )
        num_lines += len(lines)


def parse_json_object(line: str, place: str) -> dict[str, Any]:
    """The object that one line of JSON holds.

    Raises:
        DataError: no JSON or no object; `place` is where the line stands.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error}); expected one object per line") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: found {type(row).__name__}; expected one object per line")
    return row


def _json_text(line: str, text_column: str, place: str) -> str:
    row = parse_json_object(line, place)
    _check_column(text_column, row, place)
    return _checked_text(row[text_column], text_column, place)


def _checked_text(value: object, text_column: str, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{place}: text column '{text_column}' holds {type(value).__name__}; expected text or null")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: text column '{text_column}' has a lone surrogate; expected Unicode text") from error
    return value


def _check_column(text_column: str, columns: Iterable[str], place: str) -> None:
    if text_column not in columns:
        found = ", ".join(columns)
        raise DataError(f"{place}: no text column '{text_column}'; found columns: {found} (set text_column to one)")


def _read_parquet(path: Path, text_column: str) -> Iterator[tuple[list[str], int]]:
    import pyarrow.parquet as pq

    try:
        require_file(path)
        with pq.ParquetFile(path) as file:
            _check_column(text_column, file.schema_arrow.names, str(path))
            bytes_per_row = path.stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(ROWS_PER_BATCH, columns=[text_column]):
                values = batch.column(0).to_pylist()
                texts = [_checked_text(value, text_column, str(path)) for value in values]
                yield texts, round(len(texts) * bytes_per_row)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: text column '{text_column}' is not UTF-8 ({error})") from error
    except (FileNotFoundError, PermissionError, UnusableFileError) as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    # pyarrow reports damage by errors of many kinds, of which OSError is one.
    except Exception as error:
        raise DataError(f"{path}: damaged parquet file ({first_line(error)})") from error


def _read_hub(source: HubDataset, text_column: str) -> Iterator[tuple[list[str], int]]:
    import datasets

    try:
        stream = datasets.load_dataset(
            source.repo, source.config, split=source.split, revision=source.revision, streaming=True
        )
        for rows in stream.iter(batch_size=ROWS_PER_BATCH):
            _check_column(text_column, rows, str(source))
            yield [_checked_text(value, text_column, str(source)) for value in rows[text_column]], 0
    except DataError:
        raise
    # A hub dataset can fail with the error of any format reader or HTTP library.
    except Exception as error:
        raise DataError(f"{source}: hub dataset cannot be streamed ({type(error).__name__}: {error})") from error
