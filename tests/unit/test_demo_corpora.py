"""The demo's corpora: which text is selected; builds are deterministic, complete and usable."""

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from das_ds.errors import DataError
from launch import demo_corpora
from launch.demo_corpora import DemoCorpus, build_corpora, main, select, tokenizer_sample, train_tokenizer
from launch.demo_sources import chunks, cpp_documents, formula_documents, is_prose, parse, prose, without_docstrings

SENTENCE = "The quick brown fox jumps over the lazy dog, and nobody in the whole village is surprised by it any more."
CODE = '''class Box:
    """A box."""

    def size(self):
        """Its size.

        In meters."""

        def inner():
            "Helps."
            return 1
        return self.x
'''


def _documents(word: str) -> Callable[[], Iterator[str]]:
    return lambda: (f"{word} number {index}, {SENTENCE}" for index in range(300))


def _small_corpora() -> list[DemoCorpus]:
    return [DemoCorpus("first", _documents("alpha")), DemoCorpus("second", _documents("beta"), max_bytes=9_000)]


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(demo_corpora, "MIN_BYTES", 5_000)
    assert build_corpora(tmp_path / "corpora", _small_corpora())
    return tmp_path / "corpora"


def _texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_is_prose_accepts_sentences_only() -> None:
    assert is_prose(SENTENCE)
    assert not is_prose("Too short.")
    assert not is_prose(f">>> {SENTENCE}")
    assert not is_prose(f"{SENTENCE} See https://example.org for more.")
    assert not is_prose("x = f(a[0], b[1]) + {c: d}; " * 5)
    assert list(prose(f"Title\n\n{SENTENCE[:9]}\n  {SENTENCE[10:]}\n\n| a | b |")) == [SENTENCE]


def test_without_docstrings_dedents_functions(tmp_path: Path) -> None:
    path = tmp_path / "box.py"
    path.write_text(CODE)
    parsed = parse(path)
    assert parsed is not None
    box = parsed[0].body[0]
    assert isinstance(box, ast.ClassDef)
    size = box.body[1]
    assert isinstance(size, ast.FunctionDef)
    assert without_docstrings(size, parsed[1]).split("\n") == [
        "def size(self):",
        "",
        "    def inner():",
        "        return 1",
        "    return self.x",
    ]


def test_parse_skips_files_that_are_not_python(tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text("print 1")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9")
    assert parse(tmp_path / "old.py") is None
    assert parse(tmp_path / "latin.py") is None


def test_chunks_keep_every_paragraph_complete() -> None:
    paragraphs = [f"paragraph {number} {'x' * 400}" for number in range(9)]
    found = list(chunks("\n\n".join(paragraphs)))
    assert len(found) == 3
    assert "".join(found).split("\n")[:-1] == paragraphs


def test_documents_come_from_installed_packages() -> None:
    formula = next(formula_documents())
    header = next(cpp_documents())
    assert "assert" not in formula
    assert header


def test_select_is_distinct_sized_and_independent_of_order() -> None:
    documents = [f"{number} {SENTENCE}" for number in range(50)]
    chosen = select(documents, 2_000)
    assert chosen == select(documents[::-1] * 2, 2_000)
    assert len(set(chosen)) == len(chosen)
    size = len(documents[-1].encode())
    assert 2_000 - size <= sum(len(text.encode()) for text in chosen) <= 2_000


def test_select_drops_fragments_giants_and_lone_surrogates() -> None:
    chosen = select(["short", "x" * 20_000, f"  {SENTENCE}\ud800\n"], 10_000)
    assert chosen == [SENTENCE]


def test_build_corpora_writes_disjoint_splits_within_the_size(built: Path) -> None:
    for name, word in (("first", "alpha"), ("second", "beta")):
        train, valid = (_texts(built / name / f"{part}.jsonl") for part in ("train", "valid"))
        assert not set(train) & set(valid)
        assert len(valid) == round(0.05 * (len(train) + len(valid)))
        assert all(text.startswith(word) for text in train + valid)
    assert sum(len(text) for text in train + valid) <= 9_000


def test_build_corpora_complete_folder_is_kept(built: Path) -> None:
    before = (built / "manifest.json").stat().st_mtime_ns
    assert not build_corpora(built, _small_corpora())
    assert (built / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["truncated", "missing", "no manifest", "broken manifest", "other versions"])
def test_build_corpora_incomplete_folder_is_rebuilt(built: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    train = built / "first" / "train.jsonl"
    manifest = built / "manifest.json"
    content = train.read_bytes()
    if damage == "truncated":
        train.write_bytes(content[:100])
    elif damage == "missing":
        train.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "broken manifest":
        manifest.write_text("{")
    else:
        monkeypatch.setattr(demo_corpora, "SOURCES", ("torch",))
    assert build_corpora(built, _small_corpora())
    assert train.read_bytes() == content


def test_build_corpora_small_corpus_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"demo corpus 'first': found .* bytes .* expected at least 1000000"):
        build_corpora(tmp_path / "corpora", _small_corpora())


def test_train_tokenizer_round_trips_text(built: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built / "tokenizer")
    assert tokenizer.is_fast
    assert [tokenizer.bos_token, tokenizer.eos_token] == ["<s>", "</s>"]
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2, 3, 4]
    text = "def f(x):\n    return 'né' + x\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_sample_has_the_first_corpus_and_a_tenth_of_the_others() -> None:
    assert tokenizer_sample({"a": ["1", "2"], "b": [str(number) for number in range(30)]}) == ["1", "2", "0", "1", "2"]
    assert len(train_tokenizer([SENTENCE], vocab_size=270)) == 270


def test_main_writes_once_and_reports_missing_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_corpora, "__defaults__", (_small_corpora(),))
    assert main([str(tmp_path / "corpora")]) == 2
    assert capsys.readouterr().err.startswith("das_ds: demo corpus 'first': found ")
    monkeypatch.setattr(demo_corpora, "MIN_BYTES", 5_000)
    for expected in ("written to", "up to date in"):
        assert main([str(tmp_path / "corpora")]) == 0
        assert f"tokenizer: {expected} {tmp_path / 'corpora'}" in capsys.readouterr().out
