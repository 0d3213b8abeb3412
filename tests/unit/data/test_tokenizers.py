"""Added tokens: the tokenizer of each corpus, and errors of token lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from das_ds.config import RunConfig
from das_ds.data.blocks import prepare_corpus
from das_ds.data.tokenizers import build_tokenizers
from das_ds.errors import DataError, ModelError
from das_ds.functional.token_ids import num_tokens
from helpers.runs import small_run
from helpers.tiny_tokenizer import tiny_tokenizer, word_tokenizer


def config(folder: Path, **add_tokens: Any) -> RunConfig:
    values = small_run(folder, data={"add_tokens": add_tokens})
    return RunConfig(**values)


def test_build_tokenizers_tokens_apply_from_their_domain_on(tmp_path: Path) -> None:
    (tmp_path / "papers.tokens").write_text("treebanks\n\n baseline \n", encoding="utf-8")
    run = config(tmp_path, food=["noodles"], papers=str(tmp_path / "papers.tokens"))
    base = tiny_tokenizer()
    found = build_tokenizers(run, base)
    assert {name: num_tokens(tokenizer.get_vocab()) for name, tokenizer in found.items()} == {
        "food": 301,
        "papers": 303,
        "general": 300,
    }
    assert found["papers"].convert_tokens_to_ids(["noodles", "treebanks", "baseline"]) == [300, 301, 302]
    assert found["food"].tokenize("treebanks") == base.tokenize("treebanks")
    assert found["papers"].tokenize("treebanks") == ["treebanks"]
    assert num_tokens(base.get_vocab()) == 300


def test_build_tokenizers_match_complete_words(tmp_path: Path) -> None:
    tokenizer = build_tokenizers(config(tmp_path, food=["stroke"]), tiny_tokenizer())["food"]
    assert "stroke" in tokenizer.tokenize("a stroke.") and "stroke" not in tokenizer.tokenize("strokes")


def test_build_tokenizers_have_separate_cache_entries(tmp_path: Path) -> None:
    run = config(tmp_path, papers=["treebanks"])
    for name, tokenizer in build_tokenizers(run, tiny_tokenizer()).items():
        if name != "general":
            prepare_corpus(run.domains[0], run.data, tokenizer, objective="mlm", progress=False)
    assert len(list((tmp_path / "cache").glob("*.json"))) == 2


def test_build_tokenizers_known_tokens_are_skipped_with_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = config(tmp_path, food=["noodles"], papers=["noodles", "treebanks"])
    assert num_tokens(build_tokenizers(run, tiny_tokenizer())["papers"].get_vocab()) == 302
    assert "data.add_tokens.papers: already in the vocabulary, skipped: noodles" in caplog.text


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "data.add_tokens.papers: found no token"),
        (["a", " "], "found no token or an empty one"),
        (["treebanks", "treebanks"], "found more than once: treebanks"),
        (
            "missing.tokens",
            r"missing.tokens: cannot be read \(No such file or directory\); expected one token per line",
        ),
    ],
)
def test_build_tokenizers_bad_list_raises(tokens: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        build_tokenizers(config(tmp_path, papers=tokens), tiny_tokenizer())


def test_build_tokenizers_binary_file_raises(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="tokens, line 1: found byte 0xff, expected UTF-8"):
        build_tokenizers(config(tmp_path, papers=str(tmp_path / "tokens")), tiny_tokenizer())


def test_add_tokens_unknown_domain_raises(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"data.add_tokens: found paper, allowed: a domain \(food, papers\)"):
        config(tmp_path, paper=["treebanks"])


def test_add_tokens_with_lora_raises(tmp_path: Path) -> None:
    values = small_run(tmp_path, data={"add_tokens": {"papers": ["treebanks"]}}, model={"lora": {}})
    with pytest.raises(ValidationError, match="embeddings are frozen and new tokens would never be learned"):
        RunConfig(**values)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_build_tokenizers_file_with_byte_order_mark(tmp_path: Path, end: str) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(b"\xef\xbb\xbf" + end.join(["treebanks", "", "noodles", ""]).encode())
    tokenizers = build_tokenizers(config(tmp_path, papers=str(path)), tiny_tokenizer())
    added = tokenizers["papers"].get_added_vocab()
    assert {"treebanks", "noodles"} <= set(added) and not any("\ufeff" in token for token in added)


def test_num_tokens_with_holes_is_largest_id_plus_one() -> None:
    tokenizer = word_tokenizer(["soup", "bread"], skipped=3)
    assert len(tokenizer) == 7 and num_tokens(tokenizer.get_vocab()) == 10


def test_build_tokenizers_reused_id_raises(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(["soup", "bread"], skipped=1)
    # The tokenizer numbers new tokens from its count, 7, which is the id of bread.
    with pytest.raises(ModelError) as caught:
        build_tokenizers(config(tmp_path, papers=["treebanks"]), tokenizer)
    assert str(caught.value) == (
        "data.add_tokens.papers: the tokenizer's ids have holes, and 'treebanks' would get one that is in use or has "
        "an old embedding; expected a tokenizer with ids from 0 to 6 without a gap"
    )
