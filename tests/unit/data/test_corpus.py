"""Corpus readers: every format gives the same documents, every fault has its message."""

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from das_ds.data import corpus
from das_ds.data.corpus import read_documents, read_lines
from das_ds.data.sources import HubDataset
from das_ds.errors import DataError

DOCUMENTS = ["first line", "", "  indented", " \t", "naïve café", "日本語", "last"]
KEPT = ["first line", "  indented", "naïve café", "日本語", "last"]


def read(path: Path, text_column: str = "text") -> list[str]:
    return [text for batch in read_documents(path, text_column) for text in batch.texts]


def as_lines(documents: list[str]) -> bytes:
    return "\n".join(documents).encode()


def as_jsonl(documents: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)).encode()


@pytest.mark.parametrize("chunk_bytes", [1, 7, 1 << 18])
@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize(("kind", "encode"), [(".txt", as_lines), (".jsonl", as_jsonl)])
def test_read_documents_formats(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    encode: Callable[[list[str]], bytes],
    suffix: str,
    pack: Callable[[bytes], bytes],
    chunk_bytes: int,
) -> None:
    monkeypatch.setattr(corpus, "CHUNK_BYTES", chunk_bytes)
    path = tmp_path / f"documents{kind}{suffix}"
    path.write_bytes(pack(encode(DOCUMENTS)))
    assert read(path) == KEPT
    assert sum(batch.num_bytes for batch in read_documents(path, "text")) == path.stat().st_size


def test_read_documents_parquet(tmp_path: Path) -> None:
    path = tmp_path / "documents.parquet"
    pq.write_table(pa.table({"id": range(len(DOCUMENTS) + 1), "text": [*DOCUMENTS, None]}), path)
    assert read(path) == KEPT
    assert sum(batch.num_bytes for batch in read_documents(path, "text")) == path.stat().st_size


def test_read_documents_crlf_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "documents.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n")
    assert read(path) == ["one", "two"]


def test_read_documents_json_null_is_blank(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": null, "meta": 1}\n\n{"text": "a\\nb", "meta": {"x": []}}\n')
    assert read(path) == ["a\nb"]


@pytest.mark.parametrize("chunk_bytes", [4, 1 << 18])
@pytest.mark.parametrize(("name", "pack"), [("bad.txt", bytes), ("bad.jsonl", bytes), ("bad.txt.gz", gzip.compress)])
def test_read_documents_not_utf8_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, pack: Callable[[bytes], bytes], chunk_bytes: int
) -> None:
    monkeypatch.setattr(corpus, "CHUNK_BYTES", chunk_bytes)
    path = tmp_path / name
    path.write_bytes(pack(b'{"text": "good"}\n{"text": "caf\xe9"}\n'))
    with pytest.raises(DataError, match=rf"{name}, line 2: found byte 0xe9, expected UTF-8"):
        read(path)


@pytest.mark.parametrize("name", ["cut.txt.gz", "cut.txt.xz", "junk.txt.gz", "junk.txt.xz", "flip.txt.gz"])
def test_read_documents_corrupt_archive_raises(tmp_path: Path, name: str) -> None:
    packed = bytearray((gzip if name.endswith("gz") else lzma).compress(as_lines(KEPT * 50)))
    if name.startswith("cut"):
        del packed[-20:]
    elif name.startswith("junk"):
        packed[:] = b"plain text"
    else:
        packed[12] ^= 0xFF
    path = tmp_path / name
    path.write_bytes(packed)
    with pytest.raises(DataError, match=rf"{name}: damaged archive"):
        read(path)


@pytest.mark.parametrize("num_zeros", [0, 4, 8 + (1 << 16)])
def test_read_documents_joined_archives_and_padding(tmp_path: Path, num_zeros: int) -> None:
    path = tmp_path / "joined.txt.xz"
    padding = bytes(num_zeros)
    path.write_bytes(lzma.compress(b"one\ntwo\n") + padding + lzma.compress(b"three\n") + padding)
    assert read(path) == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("after_first", "expected"),
    [
        (b"\xfe" + lzma.compress(b"two\n")[1:], "Input format not supported by decoder"),
        (bytes(7) + lzma.compress(b"two\n"), "found 7 zeros after a stream, expected a multiple of 4"),
        (b"junk", "Input format not supported by decoder"),
        (lzma.compress(b"two\n")[:20], "Compressed file ended before the end-of-stream marker was reached"),
    ],
)
def test_read_documents_damage_after_the_first_archive_raises(
    tmp_path: Path, after_first: bytes, expected: str
) -> None:
    path = tmp_path / "joined.txt.xz"
    path.write_bytes(lzma.compress(b"one\n") + after_first)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value) == f"{path}: damaged archive ({expected})"


@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl.xz", "gone.parquet"])
def test_read_documents_missing_file_raises(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}: cannot be read"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", "line 3: not JSON"),
        ("[" * 100_000, "line 3: not JSON"),
        ('["text"]', "line 3: found list; expected one object per line"),
        ('{"body": "x", "id": 1}', r"line 3: no text column 'text'; found columns: body, id"),
        ('{"text": 5}', "line 3: text column 'text' contains int; expected text or null"),
        ('{"text": "\\ud800"}', "line 3: text column 'text' has a lone surrogate"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 17, 1 << 18])
def test_read_documents_bad_json_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str, chunk_bytes: int
) -> None:
    monkeypatch.setattr(corpus, "CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "documents.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(DataError, match=message):
        read(path)


def test_read_documents_parquet_missing_column_raises(tmp_path: Path) -> None:
    path = tmp_path / "documents.parquet"
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), path)
    with pytest.raises(DataError, match="no text column 'text'; found columns: body, id"):
        read(path)


def test_read_documents_parquet_number_column_raises(tmp_path: Path) -> None:
    path = tmp_path / "documents.parquet"
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(DataError, match="text column 'text' contains int"):
        read(path)


def test_read_documents_parquet_not_utf8_raises(tmp_path: Path) -> None:
    path = tmp_path / "documents.parquet"
    text = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"]).buffers())
    pq.write_table(pa.table({"text": text}), path)
    with pytest.raises(DataError, match="text column 'text' is not UTF-8"):
        read(path)


def test_read_documents_corrupt_parquet_raises(tmp_path: Path) -> None:
    path = tmp_path / "documents.parquet"
    path.write_bytes(b"PAR1 no parquet")
    with pytest.raises(DataError, match="damaged parquet file"):
        read(path)


@pytest.fixture
def local_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubDataset:
    """A folder that `datasets` loads as it loads a hub dataset."""
    monkeypatch.setattr("datasets.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(as_jsonl(DOCUMENTS))
    return HubDataset(str(tmp_path / "set"))


def test_read_documents_hub_dataset(local_hub: HubDataset) -> None:
    batches = list(read_documents(local_hub, "text"))
    assert [text for batch in batches for text in batch.texts] == KEPT


def test_read_documents_hub_missing_column_raises(local_hub: HubDataset) -> None:
    with pytest.raises(DataError, match="no text column 'body'; found columns: id, text"):
        list(read_documents(local_hub, "body"))


def test_read_documents_hub_missing_split_raises(local_hub: HubDataset) -> None:
    missing = HubDataset(local_hub.repo, split="test")
    with pytest.raises(DataError, match="@test: hub dataset cannot be streamed"):
        list(read_documents(missing, "text"))


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 5, 1 << 18])
def test_read_lines_carriage_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(corpus, "CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "documents.txt"
    content = b"\xef\xbb\xbfone\rtwo\r\n\rthree\n\r\nfour"
    path.write_bytes(content)
    with path.open(encoding="utf-8-sig") as file:
        expected = [line.removesuffix("\n") for line in file]
    assert [line for lines, _ in read_lines(path) for line in lines] == expected
    assert sum(num_bytes for _, num_bytes in read_lines(path)) == len(content)


def test_read_documents_skips_blank_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "a"}\n   \n\t\n{"text": "b"}\n \n', encoding="utf-8")
    assert read(path) == ["a", "b"]
