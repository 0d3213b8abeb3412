"""Exact cuts: the tokens of the pieces are those of the whole text, for every family of tokenizers.

The text is the standard library's sources, prose, and random text that mixes scripts, white space and added tokens. The
tokenizers are trained on it, with the components of published ones.
"""

from __future__ import annotations

import random
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from das_ds.data.text_cuts import GPT2_PATTERN, KNOWN_PATTERNS, find_cut_pattern

SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "<mask>"]
LLAMA3_PATTERN = next(pattern for pattern in sorted(KNOWN_PATTERNS) if "{1,3}" in pattern)
ALPHABET = [chr(code) for code in range(32, 0x3000) if chr(code).isprintable()]
FRAGMENTS = [
    *(
        " ",
        "  ",
        "\n",
        "\t",
        "\u00a0",
        "word",
        "Word's",
        "I'LL",
        "x_1",
        "(",
        "'s",
        "...",
        "3.14",
        "\u6211\u4eec",
        "\u3002",
    ),
    *("\u0301", "\u0e33", "\u037a", "\ufdfa", "\U0001f600", "\u2581", "<s>", "<mask>", "covid", "</s"),
]


@cache
def texts() -> tuple[str, ...]:
    library = Path(sysconfig.get_paths()["stdlib"])
    # Of the second, prose, a sixth.
    sources = [
        (library / name).read_text(encoding="utf-8")[:120_000] for name in ("textwrap.py", "pydoc_data/topics.py")
    ]
    chance = random.Random(0)
    mixed = [
        "".join(chance.choice(chance.choice([ALPHABET, FRAGMENTS, [" "]])) for _ in range(chance.randrange(1, 40)))
        for _ in range(1500)
    ]
    return (*sources, *[line for line in sources[1].splitlines() if line][:2000], *mixed)


def trained(model: Any, trainer: Any, normalizer: Any = None, splitter: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if splitter is not None:
        tokenizer.pre_tokenizer = splitter
    tokenizer.train_from_iterator(texts()[2:2002], trainer)
    return tokenizer


def bpe(splitter: Any, normalizer: Any = None) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    return trained(models.BPE(), trainer, normalizer, splitter)


def byte_level(pattern: str | None = None, *before: Any, prefix: bool = False) -> Tokenizer:
    if pattern is not None:
        before += (pre_tokenizers.Split(Regex(pattern), "isolated"),)
    last = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=pattern is None)
    return bpe(pre_tokenizers.Sequence([*before, last]) if before else last)


def wordpiece(**settings: Any) -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=SPECIAL, show_progress=False)
    normalizer = normalizers.BertNormalizer(**settings)
    return trained(models.WordPiece(unk_token="<unk>"), trainer, normalizer, pre_tokenizers.BertPreTokenizer())


def unigram(splitter: Any, normalizer: Any) -> Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=1500, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    return trained(models.Unigram(), trainer, normalizer, splitter)


def sentencepiece_bpe(*, prepend: bool) -> Tokenizer:
    """Llama 2's (with a mark in front) and Gemma's: no pre-tokenizer, trained on words."""
    words = bpe(pre_tokenizers.Metaspace(prepend_scheme="never"))
    words.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous") if not prepend else None
    parts = [normalizers.Replace(" ", "\u2581")]
    words.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), *parts] if prepend else parts)
    words.decoder = decoders.Replace("\u2581", " ")
    return words


NMT = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
FAMILIES = {
    "gpt2": lambda: byte_level(),
    "roberta with prefix": lambda: byte_level(prefix=True),
    "gpt2 as split": lambda: byte_level(GPT2_PATTERN),
    "llama 3": lambda: byte_level(LLAMA3_PATTERN),
    "starcoder": lambda: byte_level(None, pre_tokenizers.Digits(individual_digits=True)),
    "falcon": lambda: byte_level(None, pre_tokenizers.Punctuation(), pre_tokenizers.Digits()),
    "bert": lambda: wordpiece(lowercase=True),
    "bert cased": lambda: wordpiece(lowercase=False, strip_accents=False),
    "t5": lambda: unigram(pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]), NMT),
    "albert": lambda: unigram(pre_tokenizers.Metaspace(), normalizers.Sequence([NMT, normalizers.Lowercase()])),
    "deberta": lambda: unigram(pre_tokenizers.Metaspace(), normalizers.Sequence([normalizers.Strip(), NMT])),
    "llama 2": lambda: sentencepiece_bpe(prepend=True),
    "gemma": lambda: sentencepiece_bpe(prepend=False),
}


def ids(tokenizer: Tokenizer, pieces: list[str]) -> list[int]:
    encodings = tokenizer.encode_batch(pieces, add_special_tokens=False)
    return [token for encoding in encodings for token in encoding.ids]


def mismatches(tokenizer: Tokenizer) -> list[str]:
    pattern = find_cut_pattern(tokenizer)
    assert pattern is not None
    return [text for text in texts() if ids(tokenizer, pattern.split(text)) != ids(tokenizer, [text])]


@cache
def family(name: str) -> str:
    return FAMILIES[name]().to_str()


@pytest.mark.parametrize("name", FAMILIES)
def test_cuts_are_exact(name: str) -> None:
    tokenizer = Tokenizer.from_str(family(name))
    assert mismatches(tokenizer) == []
    pattern = find_cut_pattern(tokenizer)
    assert pattern is not None
    # Words of prose are pieces of their own, so that most of them are seen again.
    pieces = pattern.split(texts()[1])
    assert max(map(len, pieces)) < 1000 and len(texts()[1]) / len(pieces) < 16


@pytest.mark.parametrize("name", FAMILIES)
def test_cuts_are_exact_around_added_tokens(name: str) -> None:
    # The normalizer of deberta strips.
    is_normalized = name != "deberta"
    tokenizer = Tokenizer.from_str(family(name))
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    tokenizer.add_tokens(
        [
            AddedToken("covid", single_word=True, normalized=is_normalized),
            AddedToken("x_1", normalized=is_normalized),
            AddedToken("long", normalized=is_normalized),
        ]
    )
    assert mismatches(tokenizer) == []


def test_stripped_text_with_normalized_added_tokens_has_no_exact_cut() -> None:
    tokenizer = Tokenizer.from_str(family("deberta"))
    tokenizer.add_tokens([AddedToken("long", normalized=True)])
    assert ids(tokenizer, ["a", " long"]) != ids(tokenizer, ["a long"])
    assert find_cut_pattern(tokenizer) is None


def test_places_next_to_characters_that_tokens_have_before_the_mark_are_not_cut() -> None:
    tokenizer = Tokenizer(
        models.BPE({char: n for n, char in enumerate(["a", "b", "\u2581", ">", ">\u2581"])}, [(">", "\u2581")])
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    pattern = find_cut_pattern(tokenizer)
    assert pattern is not None and pattern.split("a b> a") == ["a", " b> a"]


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": pre_tokenizers.FixedLength(5)},
        {"pre_tokenizer": pre_tokenizers.UnicodeScripts()},
        {"pre_tokenizer": pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated")},
        {"pre_tokenizer": pre_tokenizers.Metaspace(split=False)},
        {"normalizer": normalizers.Replace(Regex("a b"), "c")},
        {"normalizer": normalizers.Strip()},
        {"normalizer": normalizers.Prepend("x")},
        {"post_processor": processors.ByteLevel(), "pre_tokenizer": None},
        {"add": AddedToken("two words")},
        {"add": AddedToken("<right>", rstrip=True)},
        {"dropout": 0.1},
    ],
)
def test_unknown_tokenizers_have_no_exact_cut(change: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_str(family("gpt2"))
    assert find_cut_pattern(tokenizer) is not None
    for name, value in change.items():
        if name == "add":
            tokenizer.add_tokens([value])
        elif name == "dropout":
            tokenizer.model.dropout = value
        else:
            setattr(tokenizer, name, value)
    assert find_cut_pattern(tokenizer) is None
