"""Windows of a stream: their tokens against those of all documents in turn, made, removed and made again anywhere."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from das_ds.data import corpus as corpus_reader
from das_ds.data import encoder, part_writer, text_stream
from das_ds.data.corpus import DocumentBatch
from das_ds.data.stream_windows import WINDOWS_AHEAD, TokenStream, keep_ahead, remove_ahead
from das_ds.data.text_stream import StreamPosition
from das_ds.errors import DataError
from helpers.streams import DOCUMENTS, SEED, open_shards, stream_tokens, window_tokens, write_shards
from helpers.tiny_tokenizer import tiny_tokenizer

T = 50
NUM_WINDOWS = 45
"""More than two epochs."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    folder = tmp_path_factory.mktemp("text")
    return folder, write_shards(folder)


@pytest.fixture(scope="module")
def expected(shards: tuple[Path, list[list[str]]]) -> list[list[int]]:
    tokens = stream_tokens(shards[1], SEED, "soup-train", NUM_WINDOWS * T)
    return [tokens[start : start + T] for start in range(0, len(tokens), T)]


def there(stream: TokenStream) -> list[int]:
    return sorted(int(path.name) for path in stream.spec.folder.iterdir() if path.is_dir())


def test_windows_are_the_documents_of_all_epochs_in_turn(
    shards: tuple[Path, list[list[str]]], expected: list[list[int]], tmp_path: Path
) -> None:
    stream = open_shards(shards[0], tmp_path, T)
    assert [window_tokens(stream, number) for number in range(NUM_WINDOWS)] == expected
    positions = [stream.position(number) for number in range(NUM_WINDOWS)]
    assert positions[0] == StreamPosition() and positions == sorted(positions)  # type: ignore[type-var]
    last = positions[-1]
    assert last is not None and last.epoch >= 2, "the stream began again"


def test_windows_in_any_order_by_any_process_are_the_same(
    shards: tuple[Path, list[list[str]]], expected: list[list[int]], tmp_path: Path
) -> None:
    """Each by a stream that has read nothing, and removed afterwards, so that the next starts at its position alone."""
    for number in (0, 1, 2, 7, 3, 12, 7, 0, 39):
        fresh = pickle.loads(pickle.dumps(open_shards(shards[0], tmp_path, T)))
        assert window_tokens(fresh, number) == expected[number]
        fresh.remove([number])
        assert there(fresh) == []


def test_window_of_which_nothing_is_known_is_found_from_the_beginning(
    shards: tuple[Path, list[list[str]]],
    expected: list[list[int]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stream = open_shards(shards[0], tmp_path, T)
    assert window_tokens(stream, 9) == expected[9]
    assert there(stream) == [9]
    assert "the position of window 9 is not in" in caplog.text and "read again from window 0 on" in caplog.text


def test_remembered_position_continues_there_without_what_came_before(
    shards: tuple[Path, list[list[str]]],
    expected: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = open_shards(shards[0], tmp_path / "first", T)
    window_tokens(stream, 8)
    position = stream.position(8)
    assert position is not None and position.epoch == 0 and position.shard > 0
    opened = list[Any]()
    read = text_stream.read_documents

    def noted(shard: Any, text_column: str) -> Iterator[DocumentBatch]:
        opened.append(shard)
        return read(shard, text_column)

    monkeypatch.setattr(text_stream, "read_documents", noted)
    other = open_shards(shards[0], tmp_path / "second", T)
    other.remember(8, position)
    assert window_tokens(other, 8) == expected[8]
    # Some documents are in at most two of the shards, and those before were not opened.
    assert 1 <= len(opened) <= 2
    # What is noted already stays.
    other.remember(8, StreamPosition(epoch=7))
    assert other.position(8) == position


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        '{"epoch": 1, "other": 2}',
        '{"shard": 4}',
        '{"shard": -1}',
        '{"document": "1"}',
        '{"token": null}',
    ],
)
def test_damaged_position_is_found_again(
    shards: tuple[Path, list[list[str]]], expected: list[list[int]], tmp_path: Path, damage: str
) -> None:
    stream = open_shards(shards[0], tmp_path, T)
    window_tokens(stream, 3)
    stream.remove([3])
    (stream.spec.folder / "00000003.position.json").write_text(damage)
    assert window_tokens(stream, 3) == expected[3]


def test_damaged_window_is_made_again(
    shards: tuple[Path, list[list[str]]], expected: list[list[int]], tmp_path: Path
) -> None:
    stream = open_shards(shards[0], tmp_path, T)
    stream.require(1).path.write_bytes(b"\0")
    assert window_tokens(stream, 1) == expected[1]


def test_long_documents_are_cut_at_windows_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that are encoded in pieces and reach over several windows."""
    monkeypatch.setattr(encoder, "BATCH_CHARS", 100)
    monkeypatch.setattr(encoder, "PIECE_CHARS", 20)
    shards = write_shards(tmp_path / "text")
    long = " ".join(shards[0])
    (tmp_path / "text" / "0.txt").write_text(f"{long}\n{shards[0][0]}\n")
    shards[0] = [long, shards[0][0]]
    for size in (7, 64, 333):
        stream = open_shards(tmp_path / "text", tmp_path / "cache", size)
        found = [token for number in range(700 // size) for token in window_tokens(stream, number)]
        assert found == stream_tokens(shards, SEED, "soup-train", len(found))


def test_document_starts_are_those_of_documents_that_begin_in_the_window(
    shards: tuple[Path, list[list[str]]], expected: list[list[int]], tmp_path: Path
) -> None:
    """The tokenizer puts <s> before every document, and no text has it."""
    stream = open_shards(shards[0], tmp_path, T)
    begin = tiny_tokenizer().bos_token_id or tiny_tokenizer().convert_tokens_to_ids("<s>")
    for number in range(10):
        file = stream.require(number)
        assert file.starts.tolist() == [place for place, token in enumerate(expected[number]) if token == begin]
        assert len(file.sizes) == file.num_documents == len(file.starts)


def test_other_seeds_and_corpora_have_other_orders(shards: tuple[Path, list[list[str]]], tmp_path: Path) -> None:
    stream = open_shards(shards[0], tmp_path, T)
    for changes in ({"seed": 6}, {"corpus": "food-train"}):
        other = open_shards(shards[0], tmp_path, T, **changes)
        tokens = [token for number in range(8) for token in window_tokens(other, number)]
        spec = other.spec
        assert tokens == stream_tokens(shards[1], spec.seed, spec.corpus, 8 * T)
        assert spec.folder != stream.spec.folder
        # The text is the same.
        assert (spec.name == stream.spec.name) == (spec.corpus == stream.spec.corpus)
    assert open_shards(shards[0], tmp_path, 2 * T).spec.folder != stream.spec.folder


def test_changed_text_has_another_name(tmp_path: Path) -> None:
    write_shards(tmp_path / "text")
    before = open_shards(tmp_path / "text", tmp_path, T).spec.name
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "text", moved)
    assert open_shards(moved, tmp_path, T).spec.name == before
    path = moved / "0.txt"
    path.write_text(path.read_text()[:-2] + "x\n")
    assert open_shards(moved, tmp_path, T).spec.name != before


def test_one_process_makes_a_window_while_others_wait(
    shards: tuple[Path, list[list[str]]],
    expected: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = list[Path]()
    publish = part_writer.publish

    def noted(partial: Path, folder: Path, *counts: Any) -> Any:
        made.append(folder)
        return publish(partial, folder, *counts)

    monkeypatch.setattr("das_ds.data.stream_windows.publish", noted)
    found = dict[int, list[int]]()

    def read(number: int) -> None:
        found[number] = window_tokens(open_shards(shards[0], tmp_path, T), 0)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert list(found.values()) == [expected[0]] * 4 and len(made) == 1


def test_interrupted_shard_is_read_again_and_not_taken_to_be_at_its_end(
    shards: tuple[Path, list[list[str]]],
    expected: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = text_stream.read_documents
    failures = 3

    def failing(shard: Any, text_column: str) -> Iterator[DocumentBatch]:
        nonlocal failures
        for number, batch in enumerate(read(shard, text_column)):
            for at, text in enumerate(batch.texts):
                if failures and number + at == 2:
                    failures -= 1
                    raise DataError("the connection was lost")
                yield DocumentBatch([text], 0)

    monkeypatch.setattr(text_stream, "read_documents", failing)
    stream = open_shards(shards[0], tmp_path, T)
    for _ in range(3):
        with pytest.raises(DataError, match=r"^corpus 'soup-train': the connection was lost$"):
            stream.require(0)
    assert [window_tokens(stream, number) for number in range(NUM_WINDOWS)] == expected
    assert not list(stream.spec.folder.glob(".partial-*"))


def test_disk_is_bounded_while_windows_are_made_ahead(
    shards: tuple[Path, list[list[str]]], expected: list[list[int]], tmp_path: Path
) -> None:
    stream = open_shards(shards[0], tmp_path, T)
    previous = 0
    for window in range(20):
        for number in keep_ahead(stream, previous, window):
            stream.require(number)
            assert len(there(stream)) <= WINDOWS_AHEAD + 3
        previous = window
        # The first one, the one before, and those ahead.
        assert there(stream) == sorted({0, *range(max(0, window - 1), window + WINDOWS_AHEAD + 1)})
        assert window_tokens(stream, window) == expected[window]
    remove_ahead(stream, 19)
    assert there(stream) == [0]
    # Training that was faster than the process that makes windows ahead.
    for number in (3, 4, 5, 6):
        stream.require(number)
    assert list(keep_ahead(stream, 3, 7)) == [7, 8, 9] and there(stream) == [0, 6]


@pytest.mark.parametrize("content", ["\n", " \n\t\n"])
def test_stream_without_text_raises(tmp_path: Path, content: str) -> None:
    for name in ("0.txt", "1.txt"):
        (tmp_path / name).write_text(content)
    with pytest.raises(
        DataError, match=r"^corpus 'soup-train': no text in .*0.txt, .*1.txt; expected at least one line"
    ):
        open_shards(tmp_path, tmp_path / "cache", T).require(0)


def test_bad_shard_raises_when_it_is_reached(tmp_path: Path) -> None:
    write_shards(tmp_path / "text", 2)
    (tmp_path / "text" / "2.jsonl").write_text('{"body": "no text"}\n')
    stream = open_shards(tmp_path / "text", tmp_path / "cache", T)
    with pytest.raises(
        DataError, match=r"^corpus 'soup-train': .*2.jsonl, line 1: no text column 'text'; found columns"
    ):
        for number in range(20):
            stream.require(number)


@pytest.mark.parametrize("change", ["cut", "append", "replace", "remove"])
def test_text_that_changes_while_it_is_streamed_raises(tmp_path: Path, change: str) -> None:
    path = tmp_path / "shards" / "0.txt"
    path.parent.mkdir()
    text = "".join(f"{document}\n" for document in DOCUMENTS)
    path.write_text(text)
    stream = open_shards(path.parent, tmp_path, T)
    again = pickle.loads(pickle.dumps(stream))
    expected = [window_tokens(stream, number) for number in range(3)]
    stream.remove([1, 2])
    if change == "remove":
        path.unlink()
    else:
        path.write_text({"cut": text[:50], "append": text + "more\n", "replace": text[::-1]}[change])
    found = "cannot be read" if change == "remove" else "found another size, beginning or end than when the stream was"
    with pytest.raises(DataError, match=f"corpus 'soup-train': {path}: {found}"):
        again.require(1)
    path.write_text(text)
    assert [window_tokens(again, number) for number in range(3)] == expected


def test_file_that_is_cut_short_while_it_is_read_is_not_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_reader, "CHUNK_BYTES", 64)
    path = tmp_path / "shards" / "0.txt"
    path.parent.mkdir()
    path.write_text("".join(f"{document}\n" for document in DOCUMENTS))
    stream = open_shards(path.parent, tmp_path, T)
    stream.require(0)
    os.truncate(path, 100)
    with pytest.raises(DataError, match=f"{path}: found another size, beginning or end than when the stream was"):
        for number in range(1, 30):
            stream.require(number)


def test_bad_line_overwritten_with_spaces_continues_the_same_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_stream, "SAMPLED_BYTES", 16)
    monkeypatch.setattr(corpus_reader, "CHUNK_BYTES", 64)
    lines = [json.dumps({"text": f"document {number} has words"}) for number in range(20)]
    path = tmp_path / "text" / "0.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join([*lines[:12], "not JSON", *lines[12:]]))
    stream = open_shards(path.parent, tmp_path / "cache", T)
    first = window_tokens(stream, 0)
    with pytest.raises(DataError, match=r"^corpus 'soup-train': .*0.jsonl, line 13: not JSON"):
        for number in range(1, 20):
            stream.require(number)
    path.write_bytes(path.read_bytes().replace(b"not JSON", b" " * 8))
    again = open_shards(path.parent, tmp_path / "cache", T)
    assert again.spec == stream.spec
    documents = [json.loads(line)["text"] for line in lines]
    expected = stream_tokens([documents], SEED, "soup-train", 8 * T)
    assert first + [token for number in range(1, 8) for token in window_tokens(again, number)] == expected


def test_missing_source_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^corpus 'soup-train': .*: found no such file; expected a file, a glob"):
        open_shards(tmp_path / "nowhere", tmp_path, T)


def test_cache_that_cannot_be_written_raises(shards: tuple[Path, list[list[str]]], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    stream = open_shards(shards[0], tmp_path / "file", T)
    message = r"^corpus 'soup-train': cannot write .*free space there or set data.cache_dir$"
    with pytest.raises(DataError, match=message):
        stream.require(0)
    with pytest.raises(DataError, match=message):
        stream.remember(1, StreamPosition())


def test_text_of_unknown_tokens_raises_in_the_first_window(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "soup": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    (tmp_path / "0.txt").write_text("soup bread bread\n")
    with pytest.raises(DataError, match=r"^corpus 'soup-train': found 66.\d% unknown tokens"):
        open_shards(tmp_path, tmp_path / "cache", 30, tokenizer=tokenizer).require(0)


def test_hub_dataset_is_streamed_shard_by_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that `datasets` loads as it loads a hub dataset, with one file per shard."""
    monkeypatch.setattr("datasets.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "set").mkdir()
    documents = [[f"shard {shard} has document {number}" for number in range(5)] for shard in range(3)]
    for shard, texts in enumerate(documents):
        lines = (json.dumps({"text": text}) for text in texts)
        (tmp_path / "set" / f"train-{shard}.jsonl").write_text("\n".join(lines))
    source = corpus_reader.HubDataset(str(tmp_path / "set"))
    assert corpus_reader.count_hub_shards(source) == 3
    monkeypatch.setattr("das_ds.data.stream_windows.resolve_source", lambda _: [source])
    stream = open_shards(tmp_path, tmp_path / "cache", 40)
    numbers = (0, 1, 5, 2, 9)
    expected = stream_tokens(documents, SEED, "soup-train", 400)
    assert [window_tokens(stream, number) for number in numbers] == [
        expected[40 * number : 40 * number + 40] for number in numbers
    ]
    missing = corpus_reader.HubDataset(source.repo, split="test")
    with pytest.raises(DataError, match="@test: hub dataset cannot be streamed"):
        corpus_reader.count_hub_shards(missing)
