"""Encoder: documents to token ids, in bounded memory and with the ids of words that were seen before kept.

A fast tokenizer takes some 95 bytes of memory per byte of a text (normalized copies, alignments, offsets), so that a
long document is encoded in pieces. Where its exact cuts are known (`text_cuts`) the pieces are words, and as most
words of a text were seen before, the tokenizer itself sees only a small part of it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from das_ds.data.text_cuts import find_cut_pattern
from das_ds.errors import ModelError

logger = logging.getLogger(__name__)

BATCH_CHARS = 1 << 20
"""Characters that are encoded at once, so that a batch of documents takes 100 MB at most."""
PIECE_CHARS = 1 << 18
"""Characters of a long document that are encoded at once, at least."""
MEMORY_CHARS = 1 << 22
"""Characters of all words whose ids are kept: some 100 MB."""
MAX_NEW = 0.4
"""Fraction of a batch's words that may be new; with more the documents are encoded as they are, which is faster."""
CHECKED_DOCUMENTS = 100
CHECKED_CHARS = 2000
"""The cuts are checked on so much of the first documents."""
CONTEXT_CHARS = 512
"""Text on each side of a place that is tried as a cut."""
NUM_CANDIDATES = 16
"""Places that are tried of each kind."""
_LIKELY_CUTS = (re.compile(r"(?<=\S)(?=\s)"), re.compile(r"(?<=\w)(?=\W)"), re.compile(r"(?<=\W)(?=\w)"))


@dataclass(frozen=True)
class UnknownTokens:
    """How much of a text its tokenizer does not know; special tokens around each document do not count.

    A document without any token, such as one of characters that the tokenizer drops, counts as one unknown token.
    """

    num_unknown: int = 0
    num_tokens: int = 0

    @property
    def fraction(self) -> float:
        """Unknown tokens / all tokens of the text."""
        return self.num_unknown / max(self.num_tokens, 1)

    def __add__(self, other: UnknownTokens) -> UnknownTokens:
        return UnknownTokens(self.num_unknown + other.num_unknown, self.num_tokens + other.num_tokens)


class EncodedDocuments(NamedTuple):
    """The ids of some documents or parts of a document, one after the other."""

    ids: bytes
    """Of the encoder's `dtype`."""
    lengths: list[int]
    """Tokens of each document that ends here, including its earlier parts."""


class DocumentEncoder:
    """Encodes documents, each with the tokenizer's special tokens (`<s> document </s>`).

    Args:
        backend: the tokenizer, without truncation and padding.
        end_of_text: id of the token that ends each document, appended if the tokenizer does not add it; None: only the
            tokenizer's special tokens.

    Raises:
        ModelError: the tokenizer adds special tokens in an unknown way.
    """

    def __init__(self, backend: Tokenizer, end_of_text: int | None) -> None:
        self._backend = backend
        self._end_of_text = end_of_text
        self.dtype = np.dtype("<u2" if max(backend.get_vocab().values()) < 2**16 else "<u4")
        prefix, suffix = _special_tokens_around(backend)
        self._prefix = self._to_bytes(prefix)
        self._suffix = self._to_bytes(suffix)
        self._end = b"" if end_of_text is None else self._to_bytes([end_of_text])
        self._unknown_id = _find_unknown_id(backend)
        self._known_cuts = find_cut_pattern(backend)
        self._cuts = self._known_cuts
        self._is_checked = self._cuts is None
        self._ids_of: dict[str, bytes] = {}
        self._num_chars = 0
        self.unknown = UnknownTokens()
        """Counts of all documents so far."""
        self.num_unproven_cuts = 0
        """Places within long documents where cutting may have changed a token, so far."""

    def reset_counts(self) -> None:
        """Begin to count unknown tokens and cuts anew."""
        self.unknown = UnknownTokens()
        self.num_unproven_cuts = 0

    def restart(self) -> None:
        """Forget all documents, so that what follows depends on the tokenizer and the next documents alone."""
        self.reset_counts()
        self._cuts = self._known_cuts
        self._is_checked = self._cuts is None
        self._ids_of.clear()
        self._num_chars = 0

    def encode(self, documents: Iterable[str]) -> Iterator[EncodedDocuments]:
        """The ids of documents, in order; equal to those of the tokenizer, document by document."""
        batch: list[str] = []
        num_chars = 0
        for document in documents:
            if batch and num_chars + len(document) > BATCH_CHARS:
                yield self._encode_batch(batch)
                batch = []
                num_chars = 0
            if len(document) > BATCH_CHARS:
                yield from self._encode_long(document)
            else:
                batch.append(document)
                num_chars += len(document)
        if batch:
            yield self._encode_batch(batch)

    def _encode_batch(self, documents: Sequence[str]) -> EncodedDocuments:
        if not self._is_checked:
            self._check_cuts(documents)
        bodies = self._encode_texts(documents)
        self._count(b"".join(bodies))
        num_empty = sum(1 for body in bodies if not body)
        self.unknown += UnknownTokens(num_empty, num_empty)
        items = [self._finish(self._prefix + body) for body in bodies]
        return EncodedDocuments(b"".join(items), [len(item) // self.dtype.itemsize for item in items])

    def _encode_long(self, document: str) -> Iterator[EncodedDocuments]:
        """A document in pieces, of which only the last one ends it."""
        length = 0
        num_tokens = 0
        # The last ids are held back: a document ends in them, also if its last pieces have no token.
        last = self._prefix
        for piece in self._cut(document):
            (body,) = self._encode_texts([piece])
            num_tokens += len(body)
            self._count(body)
            if body:
                length += len(last)
                yield EncodedDocuments(last, [])
                last = body
        if num_tokens == 0:
            self.unknown += UnknownTokens(1, 1)
        last = self._finish(last)
        yield EncodedDocuments(last, [(length + len(last)) // self.dtype.itemsize])

    def _finish(self, ids: bytes) -> bytes:
        """The end of a document with what follows it."""
        ids += self._suffix
        return ids if not self._end or ids[-self.dtype.itemsize :] == self._end else ids + self._end

    def _encode_texts(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text without special tokens."""
        if self._cuts is None:
            return self._encode_directly(texts)
        words = list(map(self._cuts.split, texts))
        num_words = sum(map(len, words))
        new = set(chain.from_iterable(words)).difference(self._ids_of)
        if len(new) > MAX_NEW * num_words:
            return self._encode_directly(texts)
        ordered = list(new)
        self._ids_of.update(zip(ordered, self._encode_directly(ordered), strict=True))
        encoded = [b"".join(map(self._ids_of.__getitem__, pieces)) for pieces in words]
        self._num_chars += sum(map(len, ordered))
        if self._num_chars > MEMORY_CHARS:
            self._ids_of.clear()
            self._num_chars = 0
        return encoded

    def _check_cuts(self, documents: Sequence[str]) -> None:
        """Encode documents by themselves if the first ones show that the cuts are not exact."""
        assert self._cuts is not None
        self._is_checked = True
        sample = [document[:CHECKED_CHARS] for document in documents[:CHECKED_DOCUMENTS]]
        words = list(chain.from_iterable(map(self._cuts.split, sample)))
        if b"".join(self._encode_directly(words)) != b"".join(self._encode_directly(sample)):
            logger.warning("the tokenizer does not split at white space as its settings say; tokenizing is slower")
            self._cuts = None

    def _encode_directly(self, texts: Sequence[str]) -> list[bytes]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [self._to_bytes(encoding.ids) for encoding in encodings]

    def _to_bytes(self, ids: Sequence[int]) -> bytes:
        return np.array(ids, dtype=self.dtype).tobytes()

    def _cut(self, document: str) -> Iterator[str]:
        """Pieces of a long document, of one to two times PIECE_CHARS characters."""
        start = 0
        while len(document) - start > 2 * PIECE_CHARS:
            first = start + PIECE_CHARS
            stop = first + PIECE_CHARS
            match = self._cuts.search(document, first, stop) if self._cuts is not None else None
            if match:
                yield document[start : match.start()]
                start = match.end()
            else:
                place = self._find_likely_cut(document, first, stop)
                yield document[start:place]
                start = place
        yield document[start:]

    def _find_likely_cut(self, document: str, first: int, stop: int) -> int:
        """A place where the tokens of the text around it are those of its two sides; the last one if there is none.

        A tokenizer that depends on text further away may still have other tokens there.
        """
        self.num_unproven_cuts += 1
        for pattern in _LIKELY_CUTS:
            for match, _ in zip(pattern.finditer(document, first, stop), range(NUM_CANDIDATES), strict=False):
                place = match.start()
                left = document[place - CONTEXT_CHARS : place]
                right = document[place : place + CONTEXT_CHARS]
                both, left_ids, right_ids = self._encode_directly([left + right, left, right])
                if both == left_ids + right_ids:
                    return place
        return stop

    def _count(self, ids: bytes) -> None:
        found = np.frombuffer(ids, self.dtype)
        self.unknown += UnknownTokens(int(np.count_nonzero(found == self._unknown_id)), len(found))


def _special_tokens_around(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a document.

    Raises:
        ModelError: a post-processor of an unknown kind.
    """
    return _read_template(json.loads(backend.to_str())["post_processor"])


def _read_template(processor: dict[str, Any] | None) -> tuple[list[int], list[int]]:
    match processor:
        case None | {"type": "ByteLevel"}:
            return [], []
        case {"type": "Sequence", "processors": processors}:
            prefix: list[int] = []
            suffix: list[int] = []
            for inner in processors:
                before, after = _read_template(inner)
                prefix = before + prefix
                suffix = suffix + after
            return prefix, suffix
        case {"type": "BertProcessing" | "RobertaProcessing", "cls": [_, first], "sep": [_, last]}:
            return [first], [last]
        case {"type": "TemplateProcessing", "single": template, "special_tokens": tokens}:
            documents = [place for place, item in enumerate(template) if "Sequence" in item]
            if len(documents) != 1:
                times = "twice" if len(documents) == 2 else f"{len(documents)} times"
                raise ModelError(
                    f"tokenizer: found the document {times} in its post-processor's template; expected once"
                )
            ids = [tokens[item["SpecialToken"]["id"]]["ids"] if "SpecialToken" in item else [] for item in template]
            return list(chain(*ids[: documents[0]])), list(chain(*ids[documents[0] :]))
        case _:
            raise ModelError(
                f"tokenizer: found post-processor {processor['type'] if processor else None}; expected a template, or "
                "those of BERT, RoBERTa and byte-level BPE"
            )


def _find_unknown_id(backend: Tokenizer) -> int:
    """The id of unknown tokens; -1, which no token has, if the tokenizer knows every byte."""
    model = json.loads(backend.to_str())["model"]
    token = model.get("unk_token")
    unknown_id = model.get("unk_id")
    if unknown_id is None and token is not None:
        unknown_id = backend.token_to_id(token)
    return -1 if unknown_id is None else int(unknown_id)
