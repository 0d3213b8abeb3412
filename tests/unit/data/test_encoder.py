"""Documents to ids: equal to the tokenizer's own, in bounded memory, with words it has seen kept."""

from __future__ import annotations

import logging
import random
import re
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from das_ds.data import encoder as module
from das_ds.data.encoder import DocumentEncoder, UnknownTokens
from das_ds.errors import ModelError
from tests.helpers.tiny_tokenizer import TEXT, tiny_tokenizer, word_tokenizer

WORDS = TEXT.split()


def backend() -> Tokenizer:
    return Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())


def encoded(encoder: DocumentEncoder, documents: list[str]) -> list[list[int]]:
    """Ids of each document, from the lengths."""
    batches = list(encoder.encode(documents))
    ids = np.frombuffer(b"".join(batch.ids for batch in batches), encoder.dtype).tolist()
    lengths = [length for batch in batches for length in batch.lengths]
    assert sum(lengths) == len(ids) and len(lengths) == len(documents)
    ends = np.cumsum(lengths).tolist()
    return [ids[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def random_documents(num_documents: int, num_words: int) -> list[str]:
    chance = random.Random(num_documents)
    separators = [" "] * 8 + ["  ", ", ", "\n", ""]
    return [
        "".join(chance.choice(WORDS) + chance.choice(separators) for _ in range(chance.randrange(num_words)))
        for _ in range(num_documents)
    ]


@pytest.mark.parametrize("max_new", [0.0, 0.4, 2.0])
@pytest.mark.parametrize(("batch_chars", "piece_chars"), [(1 << 20, 1 << 18), (60, 20), (500, 100)])
@pytest.mark.parametrize("end_of_text", [None, 2, 0])
def test_encode_equals_tokenizer(
    monkeypatch: pytest.MonkeyPatch, max_new: float, batch_chars: int, piece_chars: int, end_of_text: int | None
) -> None:
    monkeypatch.setattr(module, "MAX_NEW", max_new)
    monkeypatch.setattr(module, "MEMORY_CHARS", 200)
    monkeypatch.setattr(module, "BATCH_CHARS", batch_chars)
    monkeypatch.setattr(module, "PIECE_CHARS", piece_chars)
    documents = [*random_documents(60, 60), "x", "", "one" * 50]
    encoder = DocumentEncoder(backend(), end_of_text)
    expected = [backend().encode(document).ids for document in documents]
    if end_of_text is not None:
        expected = [ids if ids[-1] == end_of_text else [*ids, end_of_text] for ids in expected]
    for _ in range(2):
        assert encoded(encoder, documents) == expected
    assert encoder.unknown.num_tokens == 2 * sum(
        max(1, len(backend().encode(document, add_special_tokens=False).ids)) for document in documents
    )


def test_encode_calls_tokenizer_for_new_words_only(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = DocumentEncoder(backend(), None)
    seen: list[str] = []
    directly = encoder._encode_directly
    monkeypatch.setattr(encoder, "_encode_directly", lambda texts: seen.extend(texts) or directly(texts))
    encoded(encoder, [TEXT] * 20)
    seen.clear()
    encoded(encoder, ["x warm bread", "x warm soup anew"] * 10 + [TEXT])
    assert set(seen) == {"x", " anew"}


def test_long_document_is_encoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_CHARS", 1000)
    monkeypatch.setattr(module, "PIECE_CHARS", 200)
    encoder = DocumentEncoder(backend(), 2)
    longest = 0
    directly = encoder._encode_directly

    def watch(texts: list[str]) -> list[bytes]:
        nonlocal longest
        longest = max(longest, *map(len, texts))
        return directly(texts)

    monkeypatch.setattr(encoder, "_encode_directly", watch)
    document = " ".join(random.Random(0).choices(WORDS, k=3000))
    assert encoded(encoder, [document]) == [backend().encode(document).ids]
    assert longest <= 400 and encoder.num_unproven_cuts == 0


@pytest.mark.parametrize(
    ("text", "has_agreement"),
    [("我们。你们吃饭" * 300, True), ("ACGTTGCA" * 400, False), ("a\n" * 1500, True)],
)
def test_text_without_exact_cuts_is_cut_where_both_sides_agree(
    monkeypatch: pytest.MonkeyPatch, text: str, has_agreement: bool
) -> None:
    monkeypatch.setattr(module, "BATCH_CHARS", 1000)
    monkeypatch.setattr(module, "PIECE_CHARS", 200)
    tokenizer = backend()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.UnicodeScripts(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    encoder = DocumentEncoder(tokenizer, None)
    (ids,) = encoded(encoder, [text])
    assert encoder.num_unproven_cuts > 3
    assert tokenizer.decode(ids) == text
    assert ids == tokenizer.encode(text).ids or not has_agreement


def test_cuts_that_are_not_exact_are_noticed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "find_cut_pattern", lambda _: re.compile("(?<=[a-z])(?=[a-z])"))
    encoder = DocumentEncoder(backend(), None)
    assert encoded(encoder, [TEXT]) == [backend().encode(TEXT).ids]
    assert caplog.record_tuples == [
        (
            "das_ds.data.encoder",
            logging.WARNING,
            "the tokenizer does not split at white space as its settings say; tokenizing is slower",
        )
    ]


@pytest.mark.parametrize("batch_chars", [1 << 20, 5])
def test_unknown_tokens_of_empty_and_long_documents(monkeypatch: pytest.MonkeyPatch, batch_chars: int) -> None:
    monkeypatch.setattr(module, "BATCH_CHARS", batch_chars)
    monkeypatch.setattr(module, "PIECE_CHARS", 2)
    encoder = DocumentEncoder(word_tokenizer(["a", "b"]).backend_tokenizer, None)
    encoded(encoder, ["a x b", "x", " " * 20, "a b a b a x"])
    assert encoder.unknown == UnknownTokens(4, 11)
    encoder.reset_counts()
    assert encoder.unknown == UnknownTokens()


TEMPLATE = processors.TemplateProcessing(single="</s> $A <s> </s>", special_tokens=[("<s>", 0), ("</s>", 2)])


@pytest.mark.parametrize(
    "processor",
    [
        None,
        processors.ByteLevel(),
        processors.BertProcessing(("</s>", 2), ("<s>", 0)),
        processors.RobertaProcessing(("</s>", 2), ("<s>", 0)),
        TEMPLATE,
        processors.Sequence([processors.ByteLevel(), TEMPLATE]),
    ],
)
def test_special_tokens_are_those_of_the_tokenizer(processor: Any) -> None:
    tokenizer = Tokenizer(models.WordLevel(word_tokenizer(["a"]).get_vocab(), "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if processor is not None:
        tokenizer.post_processor = processor
    assert encoded(DocumentEncoder(tokenizer, None), ["a a", "b"]) == [
        tokenizer.encode(text).ids for text in ("a a", "b")
    ]


def test_special_tokens_within_a_document_raise() -> None:
    tokenizer = backend()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <s> $A", special_tokens=[("<s>", 0)])
    with pytest.raises(ModelError, match="tokenizer: found the document twice"):
        DocumentEncoder(tokenizer, None)
