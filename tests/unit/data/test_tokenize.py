"""Token files: equal to the concatenated output of the tokenizer, cached by content and settings."""

import errno
import fcntl
import json
import os
import resource
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from das_ds.data import encoder, part_writer, parts, tokenize
from das_ds.data.encoder import UnknownTokens
from das_ds.data.token_file import TokenCorpus, TokenFile
from das_ds.data.tokenize import prepare_tokens
from das_ds.errors import DataError, ModelError
from tests.helpers.tiny_tokenizer import TEXT, tiny_tokenizer, word_tokenizer

LINES = TEXT.splitlines()


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT)
    return path


def prepare(
    path: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    text_column: str = "text",
    progress: bool = False,
    end_of_text: int | None = None,
) -> TokenCorpus:
    return prepare_tokens(
        [str(path)],
        corpus="soup",
        text_column=text_column,
        tokenizer=tokenizer or tiny_tokenizer(),
        cache_dir=path.parent / "cache",
        progress=progress,
        end_of_text=end_of_text,
    )


def only_file(tokens: TokenCorpus) -> TokenFile:
    (file,) = tokens.files
    return file


def stored_ids(tokens: TokenCorpus) -> list[int]:
    return [int(token) for file in tokens.files for token in np.fromfile(file.path, file.dtype)]


def stored_starts(tokens: TokenCorpus) -> list[int]:
    bounds = tokens.bounds.tolist()
    files = zip(bounds, tokens.files, strict=False)
    return [first + int(start) for first, file in files for start in np.fromfile(file.starts_path, "<u8")]


def joined_by_hand(
    tokenizer: PreTrainedTokenizerBase, lines: list[str], end_of_text: int | None
) -> tuple[list[int], list[int]]:
    """Tokens and document starts, one document after the other."""
    tokens: list[int] = []
    starts: list[int] = []
    for line in lines:
        starts.append(len(tokens))
        tokens += tokenizer(line)["input_ids"]
        if end_of_text is not None and tokens[-1] != end_of_text:
            tokens.append(end_of_text)
    return tokens, starts


def with_template(template: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with another way of adding special tokens: `A` is a document."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template.replace("A", "$A"), pair="$A $B", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize("batch_chars", [1, 100, 1000])
def test_prepare_tokens_equal_tokenizer(corpus_file: Path, monkeypatch: pytest.MonkeyPatch, batch_chars: int) -> None:
    monkeypatch.setattr(encoder, "BATCH_CHARS", batch_chars)
    tokens = prepare(corpus_file)
    tokenizer = tiny_tokenizer()
    expected = [token for line in LINES for token in tokenizer(line)["input_ids"]]
    assert stored_ids(tokens) == expected
    assert (tokens.num_tokens, tokens.num_documents, tokens.dtype) == (len(expected), len(LINES), "<u2")
    assert stored_starts(tokens) == joined_by_hand(tokenizer, LINES, None)[1]


def test_sizes_are_bytes_of_the_text_whatever_the_tokenizer_keeps(tmp_path: Path) -> None:
    lines = ["Soup  is\tserved.", "Größe: 3 €", "\u4f60\u597d", " x "]
    (tmp_path / "corpus.txt").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    # It splits at white space, which it drops.
    tokens = prepare(tmp_path / "corpus.txt", word_tokenizer(" ".join(lines).split()))
    assert (
        np.fromfile(only_file(tokens).sizes_path, "<u8").tolist()
        == [len(line.encode()) for line in lines]
        == [16, 14, 6, 3]
    )


@pytest.mark.parametrize("end_of_text", [None, 2])
def test_count_documents_counts_all_that_tokens_are_of(corpus_file: Path, end_of_text: int | None) -> None:
    tokens = prepare(corpus_file, with_template("A"), end_of_text=end_of_text)
    starts = stored_starts(tokens)
    stops = [*starts[1:], tokens.num_tokens]
    sizes = [len(line.encode()) for line in LINES]
    generator = np.random.default_rng(0)
    for first, stop in [(0, 1), (0, tokens.num_tokens), *generator.integers(0, tokens.num_tokens, (30, 2)).tolist()]:
        first, stop = min(first, stop), max(first, stop, first + 1)
        touched = [d for d in range(len(starts)) if starts[d] < stop and stops[d] > first]
        expected = (sum(stops[d] - starts[d] for d in touched), sum(sizes[d] for d in touched))
        assert tokens.count_documents(first, stop) == expected


# Nothing added (GPT-2), a token before (Llama), one after, both, and before it the token that also ends (OPT).
@pytest.mark.parametrize(
    ("template", "front"), [("A", []), ("<s> A", [0]), ("A </s>", []), ("<s> A </s>", [0]), ("</s> A", [2])]
)
@pytest.mark.parametrize("batch_chars", [100, 1000])
def test_prepare_tokens_one_end_of_text_per_document(
    corpus_file: Path, monkeypatch: pytest.MonkeyPatch, template: str, front: list[int], batch_chars: int
) -> None:
    monkeypatch.setattr(encoder, "BATCH_CHARS", batch_chars)
    tokenizer = with_template(template)
    tokens = prepare(corpus_file, tokenizer, end_of_text=2)
    documents = [[*front, *tokenizer(line, add_special_tokens=False)["input_ids"], 2] for line in LINES]
    expected = [token for document in documents for token in document]
    assert stored_ids(tokens) == expected
    assert stored_starts(tokens) == [sum(map(len, documents[:d])) for d in range(len(documents))]
    assert (tokens.num_tokens, tokens.num_documents) == (len(expected), len(LINES))


def test_prepare_tokens_end_of_text_inside_document(corpus_file: Path) -> None:
    corpus_file.write_text("warm</s>bread\nsoup</s>\nmenu\n")
    tokenizer = with_template("A")
    tokens = prepare(corpus_file, tokenizer, end_of_text=2)
    ids = stored_ids(tokens)
    starts = stored_starts(tokens)
    assert [ids[a:b].count(2) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)] == [2, 1, 1]


def test_prepare_tokens_joins_starts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(LINES[:2]))
    (tmp_path / "b.txt").write_text(LINES[2])
    tokens = prepare(tmp_path / "*.txt", with_template("A"), end_of_text=2)
    assert (stored_ids(tokens), stored_starts(tokens)) == joined_by_hand(with_template("A"), LINES[:3], 2)


def test_prepare_tokens_joins_sources_in_order(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    (tmp_path / "b.txt").write_text(LINES[0])
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": LINES[1]}))
    sources = [str(tmp_path / "b.txt"), str(tmp_path / "a.*")]
    tokens = prepare_tokens(
        sources, corpus="soup", text_column="text", tokenizer=tokenizer, cache_dir=tmp_path / "c", progress=False
    )
    assert stored_ids(tokens) == tokenizer(LINES[0])["input_ids"] + tokenizer(LINES[1])["input_ids"]


def test_prepare_tokens_large_vocabulary_is_uint32(corpus_file: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(2**16 - 300)])
    assert prepare(corpus_file, tokenizer).dtype == "<u2"
    tokenizer.add_tokens(["warm bread"])
    tokens = prepare(corpus_file, tokenizer)
    assert tokens.dtype == "<u4"
    assert 2**16 in stored_ids(tokens)


def test_prepare_tokens_ignores_truncation_and_padding(corpus_file: Path) -> None:
    plain = prepare(corpus_file)
    tokenizer = tiny_tokenizer()
    tokenizer(LINES, truncation=True, max_length=4, padding="max_length")
    assert prepare(corpus_file, tokenizer) == plain
    assert tokenizer.backend_tokenizer.truncation is not None


def test_prepare_tokens_second_call_reads_cache(corpus_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(corpus_file)
    monkeypatch.delattr(part_writer, "read_documents")
    assert prepare(corpus_file) == first
    moved = corpus_file.with_name("moved.txt")
    corpus_file.rename(moved)
    assert prepare(moved) == first


def test_prepare_tokens_cache_key_covers_content_and_settings(corpus_file: Path) -> None:
    names = [prepare(corpus_file).name, prepare(corpus_file, tiny_tokenizer(320)).name]
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["soup"])
    names += [prepare(corpus_file, tokenizer).name, prepare(corpus_file, text_column="body").name]
    names += [prepare(corpus_file, end_of_text=end).name for end in (0, 2)]
    corpus_file.write_text(TEXT + "more\n")
    names.append(prepare(corpus_file).name)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "damage", ["short tokens", "no tokens", "short starts", "no starts", "no sizes", "broken meta", "incomplete meta"]
)
def test_prepare_tokens_rewrites_damaged_part(corpus_file: Path, damage: str) -> None:
    tokens = prepare(corpus_file)
    file = only_file(tokens)
    expected = stored_ids(tokens)
    meta = file.path.with_name("meta.json")
    if damage == "short tokens":
        os.truncate(file.path, 10)
    elif damage == "no tokens":
        file.path.unlink()
    elif damage == "short starts":
        os.truncate(file.starts_path, 10)
    elif damage == "no starts":
        file.starts_path.unlink()
    elif damage == "no sizes":
        file.sizes_path.unlink()
    else:
        meta.write_text("{" if damage == "broken meta" else "{}")
    assert stored_ids(prepare(corpus_file)) == expected


@pytest.mark.parametrize("damage", ["{", "{}", "[]", '{"parts": ["gone"]}'])
def test_prepare_tokens_rewrites_damaged_entry(corpus_file: Path, damage: str) -> None:
    expected = prepare(corpus_file)
    (entry,) = (corpus_file.parent / "cache").glob("*.json")
    entry.write_text(damage)
    assert prepare(corpus_file) == expected
    assert json.loads(entry.read_text())["parts"] == [only_file(expected).path.parent.name]


def test_prepare_tokens_keeps_part_of_concurrent_job(corpus_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = part_writer.publish
    order = list[str]()

    def publish_after_another(partial: Path, folder: Path, *counts: Any) -> TokenFile:
        if not order:
            order.append("outer")
            prepare(corpus_file)
            (folder / "mark").touch()
        return publish(partial, folder, *counts)

    monkeypatch.setattr(part_writer, "publish", publish_after_another)
    file = only_file(prepare(corpus_file))
    assert file.path.with_name("mark").exists()
    assert [entry.name for entry in file.path.parents[1].iterdir()] == [file.path.parent.name]
    assert len(list((corpus_file.parent / "cache").iterdir())) == 2


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 120)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("num_processes", [1, 2])
def test_prepare_tokens_in_parts_equals_one(corpus_file: Path, num_processes: int) -> None:
    tokens = prepare_tokens(
        [str(corpus_file)],
        corpus="soup",
        text_column="text",
        tokenizer=tiny_tokenizer(),
        cache_dir=corpus_file.parent / "cache",
        progress=False,
        num_processes=num_processes,
    )
    assert len(tokens.files) > 3
    assert (stored_ids(tokens), stored_starts(tokens)) == joined_by_hand(tiny_tokenizer(), LINES, None)
    assert tokens.num_documents == len(LINES)
    assert tokens.num_new_tokens == tokens.num_tokens and tokens.seconds > 0.0
    assert prepare(corpus_file).num_new_tokens == 0


@pytest.mark.usefixtures("small_parts")
def test_prepare_tokens_continues_after_interruption(corpus_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_part = part_writer.write_part
    written = list[Path]()

    def interrupt(*arguments: Any) -> part_writer.WrittenPart:
        if len(written) == 2:
            raise KeyboardInterrupt
        part = write_part(*arguments)
        written.append(part.folder)
        return part

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(part_writer, "write_part", interrupt)
        prepare(corpus_file)
    times = [folder.stat().st_mtime_ns for folder in written]
    tokens = prepare(corpus_file)
    assert stored_ids(tokens) == joined_by_hand(tiny_tokenizer(), LINES, None)[0]
    assert [folder.stat().st_mtime_ns for folder in written] == times
    assert tokens.num_new_tokens == sum(file.num_tokens for file in tokens.files[2:])


@pytest.mark.usefixtures("small_parts")
def test_prepare_tokens_of_a_corpus_that_grew_makes_the_new_file_only(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 50)
    before = prepare(tmp_path / "*.txt")
    (tmp_path / "d.txt").write_text("d " * 50)
    after = prepare(tmp_path / "*.txt")
    assert after.files[:3] == before.files and after.name != before.name
    assert after.num_new_tokens == after.files[3].num_tokens


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("num_processes", [1, 2])
def test_prepare_tokens_error_in_a_part_names_the_line(corpus_file: Path, num_processes: int, tmp_path: Path) -> None:
    corpus_file.write_bytes(b"good line\n" * 50 + b"b\xe9d\n" + b"good line\n" * 50)
    with pytest.raises(DataError, match=r"corpus 'soup': .*corpus\.txt, line 51: found byte 0xe9"):
        prepare_tokens(
            [str(corpus_file)],
            corpus="soup",
            text_column="text",
            tokenizer=tiny_tokenizer(),
            cache_dir=tmp_path / "cache",
            progress=False,
            num_processes=num_processes,
        )
    assert not list((tmp_path / "cache").glob("*.json"))


@pytest.mark.usefixtures("small_parts")
def test_prepare_tokens_process_that_is_killed_raises(corpus_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*_: Any) -> None:
        raise BrokenProcessPool("a process ended")

    monkeypatch.setattr(part_writer, "as_completed", kill)
    with pytest.raises(DataError, match=r"corpus 'soup': a tokenizing process was killed, .* with fewer processes"):
        prepare_tokens(
            [str(corpus_file)],
            corpus="soup",
            text_column="text",
            tokenizer=tiny_tokenizer(),
            cache_dir=corpus_file.parent / "cache",
            progress=False,
            num_processes=2,
        )


def test_prepare_tokens_warns_of_cuts_that_may_change_a_token(
    corpus_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(encoder, "BATCH_CHARS", 100)
    monkeypatch.setattr(encoder, "PIECE_CHARS", 40)
    corpus_file.write_text("x" * 200 + "\nshort\n")
    prepare(corpus_file)
    assert "corpus 'soup': documents of more than a million characters were cut at 2 places" in caplog.text


def test_remove_abandoned_keeps_what_is_being_written(tmp_path: Path) -> None:
    for name in ("dead", "alive", "starting"):
        (tmp_path / f".partial-{name}").mkdir()
    (tmp_path / ".partial-dead" / "lock").touch()
    (tmp_path / "part").mkdir()
    with (tmp_path / ".partial-alive" / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        part_writer.remove_abandoned(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".partial-alive", ".partial-starting", "part"]
    os.utime(tmp_path / ".partial-starting", (0, 0))
    part_writer.remove_abandoned(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part"]


@pytest.mark.parametrize(("on_terminal", "expected"), [(True, "tokenize soup: 100%"), (False, "tokenized soup: 419 ")])
def test_prepare_tokens_progress_bar_or_line(
    on_terminal: bool,
    expected: str,
    corpus_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tokenize, "is_terminal", lambda: on_terminal)
    prepare(corpus_file, progress=True)
    error = capsys.readouterr().err
    assert expected in error and ("\r" in error) == on_terminal


@pytest.mark.parametrize("text", ["", "\n \n\t\n"])
def test_prepare_tokens_empty_corpus_raises(tmp_path: Path, text: str) -> None:
    path = tmp_path / "blank.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=r"corpus 'soup': no text in .*blank\.txt; expected at least one line"):
        prepare(path)
    assert not list((tmp_path / "cache").glob("*.json"))


def test_prepare_tokens_error_names_corpus(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"corpus 'soup': .*missing\.txt: found no such file"):
        prepare(tmp_path / "missing.txt")


def test_prepare_tokens_full_disk_raises_and_cleans_up(corpus_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot write tokens in .*/cache \(No space left on device\); free space"):
        prepare(corpus_file)
    assert [path.name for path in (corpus_file.parent / "cache").rglob("*")] == ["parts"]


def test_prepare_tokens_removes_what_ended_processes_left(corpus_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partials = []

    def fill_disk(jobs: Any, *_: Any) -> Iterator[part_writer.WrittenPart]:
        partial = jobs[0].folder.with_name(f"{part_writer.PARTIAL_PREFIX}ended")
        partial.mkdir(parents=True)
        (partial / "lock").touch()
        (partial / "tokens.bin").write_bytes(bytes(1000))
        partials.append(partial)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield

    monkeypatch.setattr(tokenize, "write_parts", fill_disk)
    with pytest.raises(DataError, match=r"cannot write tokens in .*/cache \(No space left on device\)"):
        prepare(corpus_file)
    assert len(partials) == 1 and not partials[0].exists()


@pytest.mark.parametrize("num_processes", [1, 2])
def test_prepare_tokens_text_that_changes_meanwhile_raises_and_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_processes: int
) -> None:
    changing, other = tmp_path / "changing.txt", tmp_path / "other.txt"
    for path in (changing, other):
        path.write_text(f"{TEXT}\n{path.name}\n")
    expected = stored_ids(prepare(changing))
    arguments: dict[str, Any] = {
        "corpus": "soup",
        "text_column": "text",
        "tokenizer": tiny_tokenizer(),
        "cache_dir": tmp_path / "new",
        "progress": False,
        "num_processes": num_processes,
    }
    divide = tokenize.divide_sources

    def change_first(*sources: Any) -> list[parts.Part]:
        changing.write_text("other text of as many\n" * 9)
        return divide(*sources)

    # Each file is a part.
    monkeypatch.setattr(parts, "PART_BYTES", len(TEXT))
    with monkeypatch.context() as patch, pytest.raises(DataError) as caught:
        patch.setattr(tokenize, "divide_sources", change_first)
        prepare_tokens([str(changing), str(other)], **arguments)
    assert str(caught.value).startswith(f"corpus 'soup': {changing}: found other content than when it was first read")
    changing.write_text(f"{TEXT}\n{changing.name}\n")
    assert stored_ids(prepare_tokens([str(changing)], **arguments)) == expected


def test_prepare_tokens_file_that_is_only_touched_meanwhile_is_kept(
    corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stored_ids(prepare(corpus_file))
    divide = tokenize.divide_sources

    def touch_first(*sources: Any) -> list[parts.Part]:
        os.utime(corpus_file, (0, 0))
        return divide(*sources)

    monkeypatch.setattr(tokenize, "divide_sources", touch_first)
    found = prepare_tokens(
        [str(corpus_file)],
        corpus="soup",
        text_column="text",
        tokenizer=tiny_tokenizer(),
        cache_dir=corpus_file.parent / "new",
        progress=False,
    )
    assert stored_ids(found) == expected


@contextmanager
def small_files() -> Iterator[None]:
    # Only around the call: pytest writes its own output under the same limit.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_prepare_tokens_short_write_raises(corpus_file: Path) -> None:
    with pytest.raises(DataError, match=r"cannot write tokens in .*/cache \(File too large\)"), small_files():
        prepare(corpus_file)
    assert [path.name for path in (corpus_file.parent / "cache").rglob("*")] == ["parts"]


def test_prepare_tokens_cache_folder_is_file_raises(corpus_file: Path) -> None:
    (corpus_file.parent / "cache").touch()
    with pytest.raises(DataError, match=r"cannot write tokens in .*/cache \(File exists\)"):
        prepare(corpus_file)


def test_build_backend_slow_tokenizer_raises(corpus_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(ModelError, match="is written in Python; expected a fast tokenizer"):
        prepare(corpus_file)


def test_unknown_tokens_are_counted_and_cached(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("a b c\na x\nb\n")
    tokenizer = word_tokenizer(["a", "b", "c"])
    expected = UnknownTokens(num_unknown=1, num_tokens=6)
    assert prepare(path, tokenizer).unknown == expected
    assert prepare(path, tokenizer).unknown == expected
    assert prepare(path, tokenizer, end_of_text=2).unknown == expected


def test_unknown_tokens_exclude_special_tokens(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("a\nb\n")
    tokenizer = word_tokenizer(["a", "b"], unk_token="</s>")
    tokenizer.backend_tokenizer.model = models.WordLevel(tokenizer.get_vocab(), unk_token="</s>")
    assert prepare(path, tokenizer).unknown == UnknownTokens(0, 2)
    path.write_text("a\nx\nb\n")
    assert prepare(path, tokenizer).unknown == UnknownTokens(1, 3)


def test_unknown_tokens_byte_level_is_zero(corpus_file: Path) -> None:
    assert prepare(corpus_file).unknown.num_unknown == 0


def test_unknown_tokens_above_limit_raise_also_from_cache(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("a x y\nz a z z z\n")
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            prepare(path, word_tokenizer(["a"]))
        assert str(caught.value) == (
            "corpus 'soup': found 75.0% unknown tokens, allowed: at most 50%; the tokenizer is not made for this text "
            "(data.tokenizer)"
        )


def test_unknown_tokens_empty_document_counts(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("a\nx\ny\n")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(DataError, match=r"found 66\.7% unknown tokens"):
        prepare(path, tokenizer)


def test_unknown_tokens_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("a a a x\n")
    prepare(path, word_tokenizer(["a"]), progress=True)
    assert caplog.messages == ["corpus 'soup': 6 tokens, 25.00% of the text's unknown"]
