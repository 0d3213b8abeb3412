"""Text to one flat file of token ids, cached by the content of the text and the settings that shape the tokens.

A cache entry is a folder `<corpus>-<key>` with `tokens.bin` (little-endian uint16 or uint32), `starts.bin` (the index
of each document's first token, little-endian uint64) and `meta.json`. It is written elsewhere and renamed when
complete, so an entry that exists is whole.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import xxhash
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from das_ds.data.corpus import read_documents
from das_ds.data.sources import Source, fingerprint, resolve_source
from das_ds.errors import DataError, ModelError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
NOTABLY_UNKNOWN, MOST_UNKNOWN = 0.01, 0.5
"""Shares of unknown tokens above which a text is warned of, and refused."""
STARTS_DTYPE = np.dtype("<u8")
# Small enough that the tokenizer's results stay in the processor's cache, large enough to occupy every core.
DOCUMENTS_PER_CALL = 1000


@dataclass(frozen=True)
class UnknownTokens:
    """How much of a text its tokenizer does not know; tokens that a tokenizer puts around every document do not count.

    A document that gives no token at all, as one of letters that a tokenizer drops, counts as one unknown token.
    """

    num_unknown: int = 0
    num_tokens: int = 0

    @property
    def share(self) -> float:
        """Unknown tokens in all tokens of the text."""
        return self.num_unknown / max(self.num_tokens, 1)


class UnknownCounter:
    """Counts in the tokens of documents.

    Args:
        backend: the tokenizer.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend, self._id = backend, _unknown_id(backend)
        around = backend.encode("").ids
        self._num_around = len(around)
        # GPT-2's kind names the end of a text as the unknown token, and some tokenizers put it around documents.
        self._unknown_around = around.count(self._id)
        self._num_unknown = self._num_tokens = 0

    def add(self, ids: list[int]) -> None:
        """Count one document, as the tokenizer gives it."""
        num_tokens = len(ids) - self._num_around
        self._num_tokens += max(num_tokens, 1)
        self._num_unknown += ids.count(self._id) - self._unknown_around if num_tokens > 0 else 1

    def add_texts(self, texts: list[str]) -> None:
        """Tokenize and count documents."""
        for encoding in self._backend.encode_batch_fast(texts):
            self.add(encoding.ids)

    @property
    def total(self) -> UnknownTokens:
        """Of all documents so far."""
        return UnknownTokens(self._num_unknown, self._num_tokens)


@dataclass(frozen=True)
class TokenFile:
    """A finished token file: `num_tokens` ids of type `dtype`, from `num_documents` documents."""

    path: Path
    dtype: str
    num_tokens: int
    num_documents: int
    unknown: UnknownTokens = UnknownTokens()

    @property
    def starts_path(self) -> Path:
        """File of the index of each document's first token, `num_documents` ascending numbers of STARTS_DTYPE."""
        return self.path.with_name("starts.bin")


def prepare_tokens(
    sources: Sequence[str],
    *,
    corpus: str,
    text_column: str,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    progress: bool,
    end_of_text: int | None = None,
) -> TokenFile:
    """Tokens of all documents of the sources in order, each with the tokenizer's special tokens (`<s> document </s>`).

    With `end_of_text` each document ends in that token; it is appended where the tokenizer does not put it there.
    Where documents start is recorded and not read off the tokens: a document's own text may hold the end-of-text
    token, and some tokenizers (OPT) begin a document with the token that ends it.

    An entry of the cache with the same content and settings is used as it is.

    Args:
        sources: files, globs and hub names.
        corpus: name of the corpus for messages and the cache entry.
        text_column: column of .jsonl, .parquet and hub datasets that holds the text.
        tokenizer: a fast tokenizer.
        cache_dir: folder of all cache entries.
        progress: show a bar.
        end_of_text: id of the token that ends each document; None adds nothing to what the tokenizer does.

    Raises:
        DataError: text that cannot be read or is empty, or a cache folder that cannot be written; names the corpus.
        ModelError: the tokenizer is not a fast one.
    """
    backend = build_backend(tokenizer)
    with _named(corpus):
        resolved = [source for name in sources for source in resolve_source(name)]
        folder = cache_dir / f"{corpus}-{_cache_key(resolved, text_column, backend, end_of_text)}"
        token_file = _read_entry(folder)
        if token_file is None:
            token_file = _write_entry(folder, resolved, corpus, text_column, backend, end_of_text, progress)
        if progress:
            level = logging.WARNING if token_file.unknown.share > NOTABLY_UNKNOWN else logging.INFO
            share = f"{token_file.unknown.share:.2%}"
            logger.log(level, "corpus '%s': %d tokens, %s of the text's unknown", corpus, token_file.num_tokens, share)
        check_unknown_tokens(token_file.unknown)
    return token_file


def check_unknown_tokens(unknown: UnknownTokens) -> None:
    """Raises DataError where a tokenizer does not know most of a text."""
    if unknown.share > MOST_UNKNOWN:
        raise DataError(
            f"found {unknown.share:.1%} unknown tokens, allowed: at most {MOST_UNKNOWN:.0%}; the tokenizer is not made "
            "for this text (data.tokenizer)"
        )


@contextmanager
def _named(corpus: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"corpus '{corpus}': {error}") from error


def build_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer without cutting and padding.

    Raises:
        ModelError: it is not a fast one.
    """
    if not tokenizer.is_fast:
        found = type(tokenizer).__name__
        raise ModelError(f"tokenizer {found} is written in Python; expected a fast tokenizer (with a tokenizer.json)")
    # A copy, because documents must not be cut or padded and the caller's tokenizer may be set to do so.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def _cache_key(sources: Sequence[Source], text_column: str, backend: Tokenizer, end_of_text: int | None) -> str:
    parts = [FORMAT_VERSION, text_column, end_of_text, backend.to_str(), [fingerprint(source) for source in sources]]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())


def _read_entry(folder: Path) -> TokenFile | None:
    """The entry, or None where there is none, its size is not the recorded one, or unknown tokens were not counted."""
    path = folder / "tokens.bin"
    try:
        meta = json.loads((folder / "meta.json").read_text())
        unknown = UnknownTokens(**meta["unknown"])
        token_file = TokenFile(path, meta["dtype"], meta["num_tokens"], meta["num_documents"], unknown)
        whole = (
            path.stat().st_size == token_file.num_tokens * np.dtype(token_file.dtype).itemsize
            and token_file.starts_path.stat().st_size == token_file.num_documents * STARTS_DTYPE.itemsize
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return token_file if whole else None


def _write_entry(
    folder: Path,
    sources: Sequence[Source],
    corpus: str,
    text_column: str,
    backend: Tokenizer,
    end_of_text: int | None,
    progress: bool,
) -> TokenFile:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=".partial-", ignore_cleanup_errors=True) as scratch:
            partial = Path(scratch) / folder.name
            partial.mkdir()
            token_file = _tokenize(partial, sources, corpus, text_column, backend, end_of_text, progress)
            meta = {**asdict(token_file), "path": "tokens.bin", "sources": [str(source) for source in sources]}
            (partial / "meta.json").write_text(json.dumps(meta, indent=1))
            _publish(partial, folder)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"cannot write tokens in {folder.parent} ({reason}); free space there or set data.cache_dir"
        ) from error
    return replace(token_file, path=folder / "tokens.bin")


def _publish(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        # Another job may have published the same entry meanwhile; a damaged one is replaced.
        if _read_entry(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)


def _tokenize(
    folder: Path,
    sources: Sequence[Source],
    corpus: str,
    text_column: str,
    backend: Tokenizer,
    end_of_text: int | None,
    progress: bool,
) -> TokenFile:
    dtype = np.dtype("<u2" if max(backend.get_vocab().values()) < 2**16 else "<u4")
    result = TokenFile(folder / "tokens.bin", dtype.str, 0, 0)
    total = sum(source.stat().st_size for source in sources if isinstance(source, Path))
    counter = UnknownCounter(backend)
    bar = tqdm(total=total or None, desc=f"tokenize {corpus}", unit="B", unit_scale=True, disable=not progress)
    with result.path.open("wb") as tokens, result.starts_path.open("wb") as starts, bar:
        for source in sources:
            for batch in read_documents(source, text_column):
                for ids, lengths in _encoded(batch.texts, backend, end_of_text, counter):
                    tokens.write(np.array(ids, dtype=dtype).data)
                    ends = np.cumsum(lengths)
                    starts.write((result.num_tokens + ends - lengths).astype(STARTS_DTYPE).data)
                    result = replace(
                        result,
                        num_tokens=result.num_tokens + len(ids),
                        num_documents=result.num_documents + len(lengths),
                    )
                bar.update(batch.num_bytes)
        for file in (tokens, starts):
            file.flush()
            os.fsync(file.fileno())
    if result.num_documents == 0:
        raise DataError(f"no text in {', '.join(map(str, sources))}; expected at least one line that is not blank")
    return replace(result, unknown=counter.total)


def count_tokens(
    sources: Iterable[Source],
    *,
    text_column: str,
    tokenizer: PreTrainedTokenizerBase,
    end_of_text: int | None,
    enough: int,
) -> int:
    """Tokens that `prepare_tokens` would give; no text is read beyond the first `enough` of them.

    Raises:
        DataError: text that cannot be read.
        ModelError: the tokenizer is not a fast one.
    """
    backend, num_tokens = build_backend(tokenizer), 0
    for source in sources:
        for batch in read_documents(source, text_column):
            # One by one: the first document may be enough.
            for text in batch.texts:
                num_tokens += sum(len(ids) for ids, _ in _encoded([text], backend, end_of_text))
                if num_tokens >= enough:
                    return num_tokens
    return num_tokens


def _encoded(
    texts: Iterable[str], backend: Tokenizer, end_of_text: int | None, counter: UnknownCounter | None = None
) -> Iterator[tuple[list[int], list[int]]]:
    """Joined tokens of a few documents and the number of tokens of each; `counter` counts them before they end."""
    remaining = iter(texts)
    while documents := list(islice(remaining, DOCUMENTS_PER_CALL)):
        ids: list[int] = []
        lengths: list[int] = []
        for encoding in backend.encode_batch_fast(documents):
            document = encoding.ids
            if counter is not None:
                counter.add(document)
            if end_of_text is not None and document[-1:] != [end_of_text]:
                document.append(end_of_text)
            ids += document
            lengths.append(len(document))
        yield ids, lengths


def _unknown_id(backend: Tokenizer) -> int:
    """The id that stands for what the tokenizer does not know; -1, which is none, where it knows every byte."""
    model = json.loads(backend.to_str())["model"]
    token, number = model.get("unk_token"), model.get("unk_id")
    if number is None and token is not None:
        number = backend.token_to_id(token)
    return -1 if number is None else int(number)
