"""Documents of a text source, in batches and constant memory.

Files are read by a plain line reader, `json` and `pyarrow`: never slower than the streaming readers of `datasets`
(text over ten times faster), and an error can name its byte or line. Hub data sets are streamed by `datasets`.
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
from das_ds.errors import DataError

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
            hub data set that cannot be streamed.
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
    suffix = file_suffix(path)
    if suffix.endswith(".gz"):
        return gzip.open(file)
    return lzma.open(file) if suffix.endswith(".xz") else nullcontext(file)


def read_lines(path: Path) -> Iterator[tuple[list[str], int]]:
    """Lines of a file of text, packed or not, in chunks, each with the bytes of the file that it took.

    Raises:
        DataError: unreadable or damaged file, text that is not UTF-8.
    """
    offset = position = 0
    try:
        with path.open("rb") as file, _unpacked(path, file) as stream:
            while chunk := stream.read(CHUNK_BYTES) + stream.readline():
                text = chunk.decode()
                # Some editors begin a file with a byte-order mark, which is no part of the text.
                text = text if offset else text.removeprefix("\ufeff")
                last, position = position, file.tell()
                yield [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")], position - last
                offset += len(chunk)
    except UnicodeDecodeError as error:
        found = error.object[error.start]
        raise DataError(
            f"{path}: found byte 0x{found:02x} at byte {offset + error.start} of the unpacked text; expected UTF-8"
        ) from error
    except DAMAGE as error:
        raise DataError(f"{path}: damaged archive ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_jsonl(path: Path, text_column: str) -> Iterator[tuple[list[str], int]]:
    num_lines = 0
    for lines, num_bytes in read_lines(path):
        rows = enumerate(lines, num_lines + 1)
        yield [_json_text(line, text_column, f"{path}, line {number}") for number, line in rows if line], num_bytes
        num_lines += len(lines)


def json_object(line: str, place: str) -> dict[str, Any]:
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
    row = json_object(line, place)
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
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _check_column(text_column, file.schema_arrow.names, str(path))
            bytes_per_row = path.stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(ROWS_PER_BATCH, columns=[text_column]):
                values = batch.column(0).to_pylist()
                texts = [_checked_text(value, text_column, str(path)) for value in values]
                yield texts, round(len(texts) * bytes_per_row)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: text column '{text_column}' is not UTF-8 ({error})") from error
    except pa.ArrowException as error:
        raise DataError(f"{path}: damaged parquet file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


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
    # A hub data set can fail with the error of any format reader or HTTP library.
    except Exception as error:
        raise DataError(f"{source}: hub data set cannot be streamed ({type(error).__name__}: {error})") from error
