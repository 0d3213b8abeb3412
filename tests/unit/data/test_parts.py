"""Parts of a corpus: together they are its documents, in order, whatever their size."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from das_ds.data import corpus, parts
from das_ds.data.corpus import read_documents
from das_ds.data.parts import Part, divide_sources
from das_ds.data.sources import HubDataset, resolve_source
from das_ds.errors import DataError


def documents(divided: list[Part]) -> list[str]:
    pieces = (piece for part in divided for piece in part)
    return [text for piece in pieces for batch in read_documents(piece, "text") for text in batch.texts]


def random_lines(seed: int) -> bytes:
    """Lines of random lengths, some of them empty, that end in LF, CR LF or CR."""
    chance = random.Random(seed)
    ends = chance.choice([["\n"], ["\r\n"], ["\r"], ["\n", "\r\n", "\r"]])
    lines = (chance.choice("abé\U0001f600") * chance.choice([0, 1, 3, 40]) for _ in range(60))
    return "".join(line + chance.choice(ends) for line in lines).encode() + b"end" * chance.randrange(2)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("part_bytes", [1, 7, 64, 300, 100_000])
def test_divide_text_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, part_bytes: int) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(random_lines(seed))
    expected = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    monkeypatch.setattr(parts, "PART_BYTES", part_bytes)
    monkeypatch.setattr(parts, "SEARCH_BYTES", 5)
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 11)
    divided = divide_sources([path])
    assert documents(divided) == expected
    assert sum(piece.num_bytes for part in divided for piece in part) == path.stat().st_size
    # As many as there are, unless a line is longer than a part.
    longest = max(len(line.encode()) for line in expected) + 2
    assert all(sum(piece.num_bytes for piece in part) <= part_bytes + longest for part in divided)


def test_divide_parquet_at_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text {number}" for number in range(100)]
    path = tmp_path / "text.parquet"
    pq.write_table(pa.table({"text": texts, "other": texts}), path, row_group_size=10)
    monkeypatch.setattr(parts, "PART_BYTES", 600)
    divided = divide_sources([path])
    assert 3 < len(divided) < 11 and documents(divided) == texts


def test_divide_joins_small_sources_and_keeps_others_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"text {number}\n")
    (tmp_path / "6.txt.gz").write_bytes(b"x" * 300)
    sources = resolve_source(f"{tmp_path}/*")
    monkeypatch.setattr(parts, "PART_BYTES", 25)
    hub = HubDataset("owner/name", revision="abc")
    found = [[piece.source for piece in part] for part in divide_sources([*sources, hub])]
    assert found == [sources[:3], sources[3:6], [sources[6]], [hub]] or found == [
        sources[:3],
        sources[3:6],
        [sources[6], hub],
    ]


def test_divide_missing_file_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read"):
        divide_sources([tmp_path / "gone.txt"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"caf\xe9", "line 41: found byte 0xe9, expected UTF-8"),
        (b"{", "line 41: not JSON"),
        (b'{"body": 1}', "line 41: no text column 'text'; found columns: body"),
    ],
)
def test_errors_in_a_later_part_name_the_line_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: bytes, message: str
) -> None:
    path = tmp_path / "text.jsonl"
    row = json.dumps({"text": "good"}).encode()
    path.write_bytes(b"\n".join([row] * 40 + [bad] + [row] * 10))
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    divided = divide_sources([path])
    assert len(divided) > 3
    with pytest.raises(DataError, match=rf"text\.jsonl, {message}"):
        documents(divided)


def test_long_rows_of_parquet_are_read_few_at_once(tmp_path: Path) -> None:
    path = tmp_path / "text.parquet"
    texts = [f"{number}" * 100_000 for number in range(10)]
    pq.write_table(pa.table({"text": texts}), path, use_dictionary=False)
    batches = [batch.texts for batch in read_documents(path, "text")]
    assert [text for batch in batches for text in batch] == texts
    assert max(map(len, batches)) <= 2
