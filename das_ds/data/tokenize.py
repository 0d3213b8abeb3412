"""Tokenization: text to one flat file of token ids, cached by the content of the text and the tokenizer's settings.

A cache entry is a folder `<corpus>-<key>` with `tokens.bin` (little-endian uint16 or uint32), `starts.bin` (the index
of each document's first token, little-endian uint64), `sizes.bin` (bytes of each document's text in UTF-8, the same)
and `meta.json`. It is written to a temporary folder and renamed
when complete, so that an existing entry is complete.
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
from das_ds.progress import is_terminal, say

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
UNKNOWN_WARNING = 0.01
UNKNOWN_LIMIT = 0.5
"""Fractions of unknown tokens above which a text causes a warning, and an error."""
STARTS_DTYPE = np.dtype("<u8")
# Small enough that the tokenizer's results stay in the CPU cache, large enough to occupy every core.
DOCUMENTS_PER_CALL = 1000


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


class UnknownCounter:
    """Counts unknown tokens, document by document.

    Args:
        backend: the tokenizer.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._unknown_id = _find_unknown_id(backend)
        special_ids = backend.encode("").ids
        self._special_per_document = len(special_ids)
        # GPT-2's unknown token is its end-of-text token, which some tokenizers put around documents.
        self._unknown_per_document = special_ids.count(self._unknown_id)
        self._num_unknown = 0
        self._num_tokens = 0

    def add(self, ids: list[int]) -> None:
        """Count one document, given its ids with the tokenizer's special tokens."""
        num_tokens = len(ids) - self._special_per_document
        self._num_tokens += max(num_tokens, 1)
        if num_tokens > 0:
            self._num_unknown += ids.count(self._unknown_id) - self._unknown_per_document
        else:
            self._num_unknown += 1

    def add_texts(self, texts: list[str]) -> None:
        """Tokenize and count documents."""
        for encoding in self._backend.encode_batch_fast(texts):
            self.add(encoding.ids)

    @property
    def total(self) -> UnknownTokens:
        """The counts of all documents so far."""
        return UnknownTokens(self._num_unknown, self._num_tokens)


@dataclass(frozen=True)
class TokenFile:
    """A complete token file: `num_tokens` ids of type `dtype`, from `num_documents` documents."""

    path: Path
    dtype: str
    num_tokens: int
    num_documents: int
    unknown: UnknownTokens = UnknownTokens()

    @property
    def starts_path(self) -> Path:
        """File of the index of each document's first token, (num_documents,) STARTS_DTYPE, ascending."""
        return self.path.with_name("starts.bin")

    @property
    def sizes_path(self) -> Path:
        """File of the UTF-8 bytes of each document's text, (num_documents,) STARTS_DTYPE."""
        return self.path.with_name("sizes.bin")

    def count_documents(self, first: int, stop: int) -> tuple[int, int]:
        """Size of the documents that tokens [first, stop) are of, each counted in full.

        Args:
            first, stop: indices of tokens, first < stop.

        Returns:
            Number of their tokens, and UTF-8 bytes of their text, of which the tokenizer may have dropped some.
        """
        starts = np.memmap(self.starts_path, STARTS_DTYPE, "r")
        sizes = np.memmap(self.sizes_path, STARTS_DTYPE, "r")
        # Starts ascend, and equal ones are documents without a token before the one that has it.
        begin = int(np.searchsorted(starts, first, side="right")) - 1
        end = int(np.searchsorted(starts, stop, side="left"))
        last_token = self.num_tokens if end == len(starts) else int(starts[end])
        return last_token - int(starts[begin]), int(sizes[begin:end].sum())


@dataclass(frozen=True)
class _Tokenization:
    """The inputs of one cache entry."""

    corpus: str
    sources: Sequence[Source]
    text_column: str
    backend: Tokenizer
    end_of_text: int | None

    @property
    def entry_name(self) -> str:
        """`<corpus>-<key>`; the key covers everything that shapes the tokens."""
        contents = [fingerprint(source) for source in self.sources]
        parts = [FORMAT_VERSION, self.text_column, self.end_of_text, self.backend.to_str(), contents]
        return f"{self.corpus}-{xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())}"


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

    With `end_of_text` each document ends in that token; it is appended if the tokenizer does not add it. The starts of
    documents are recorded and not inferred from the tokens, because a document's text may contain the end-of-text
    token, and some tokenizers (OPT) begin a document with the token that ends it.

    A cache entry with the same content and settings is reused.

    Args:
        sources: files, globs and hub names.
        corpus: name of the corpus, for messages and the cache entry.
        text_column: column with the text in .jsonl, .parquet and hub datasets.
        tokenizer: a fast tokenizer.
        cache_dir: folder of all cache entries.
        progress: show a progress bar.
        end_of_text: id of the token that ends each document; None: only the tokenizer's special tokens.

    Raises:
        DataError: text that cannot be read or is empty, or a cache folder that cannot be written; names the corpus.
        ModelError: the tokenizer is not a fast one.
    """
    backend = build_backend(tokenizer)
    with _name_corpus(corpus):
        resolved = [source for name in sources for source in resolve_source(name)]
        job = _Tokenization(corpus, resolved, text_column, backend, end_of_text)
        folder = cache_dir / job.entry_name
        token_file = _read_entry(folder)
        if token_file is None:
            token_file = _write_entry(folder, job, progress)
        unknown = token_file.unknown
        if progress:
            level = logging.WARNING if unknown.fraction > UNKNOWN_WARNING else logging.INFO
            percent = f"{unknown.fraction:.2%}"
            logger.log(
                level, "corpus '%s': %d tokens, %s of the text's unknown", corpus, token_file.num_tokens, percent
            )
        check_unknown_tokens(unknown)
    return token_file


def check_unknown_tokens(unknown: UnknownTokens) -> None:
    """Raises DataError if a tokenizer does not know most of a text."""
    if unknown.fraction > UNKNOWN_LIMIT:
        raise DataError(
            f"found {unknown.fraction:.1%} unknown tokens, allowed: at most {UNKNOWN_LIMIT:.0%}; the tokenizer is not "
            "made for this text (data.tokenizer)"
        )


def count_tokens(
    sources: Iterable[Source],
    *,
    text_column: str,
    tokenizer: PreTrainedTokenizerBase,
    end_of_text: int | None,
    limit: int,
) -> int:
    """Number of tokens that `prepare_tokens` would write; stops reading once `limit` is reached.

    Raises:
        DataError: text that cannot be read.
        ModelError: the tokenizer is not a fast one.
    """
    backend = build_backend(tokenizer)
    num_tokens = 0
    for source in sources:
        for batch in read_documents(source, text_column):
            # One by one: the first document may be enough.
            for text in batch.texts:
                num_tokens += sum(len(ids) for ids, _ in _encode_documents([text], backend, end_of_text))
                if num_tokens >= limit:
                    return num_tokens
    return num_tokens


def build_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the Rust tokenizer, without truncation and padding.

    Raises:
        ModelError: the tokenizer is not a fast one.
    """
    if not tokenizer.is_fast:
        found = type(tokenizer).__name__
        raise ModelError(f"tokenizer {found} is written in Python; expected a fast tokenizer (with a tokenizer.json)")
    # A copy, because the caller's tokenizer keeps its own settings for truncation and padding.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


@contextmanager
def _name_corpus(corpus: str) -> Iterator[None]:
    """Put the name of the corpus in front of errors."""
    try:
        yield
    except DataError as error:
        raise DataError(f"corpus '{corpus}': {error}") from error


def _read_entry(folder: Path) -> TokenFile | None:
    """The cache entry; None if it is missing, of the wrong size, or without what earlier versions did not count."""
    path = folder / "tokens.bin"
    try:
        meta = json.loads((folder / "meta.json").read_text())
        unknown = UnknownTokens(**meta["unknown"])
        token_file = TokenFile(path, meta["dtype"], meta["num_tokens"], meta["num_documents"], unknown)
        token_bytes = token_file.num_tokens * np.dtype(token_file.dtype).itemsize
        document_bytes = token_file.num_documents * STARTS_DTYPE.itemsize
        by_document = (token_file.starts_path, token_file.sizes_path)
        is_complete = path.stat().st_size == token_bytes and all(
            other.stat().st_size == document_bytes for other in by_document
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return token_file if is_complete else None


def _write_entry(folder: Path, job: _Tokenization, progress: bool) -> TokenFile:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=".partial-", ignore_cleanup_errors=True) as scratch:
            partial = Path(scratch) / folder.name
            partial.mkdir()
            token_file = _tokenize_documents(partial, job, progress)
            meta = {**asdict(token_file), "path": "tokens.bin", "sources": [str(source) for source in job.sources]}
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
        # Another job may have published the same entry in the meantime; a corrupt one is replaced.
        if _read_entry(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)


def _tokenize_documents(folder: Path, job: _Tokenization, progress: bool) -> TokenFile:
    """Write `tokens.bin`, `starts.bin` and `sizes.bin`."""
    dtype = np.dtype("<u2" if max(job.backend.get_vocab().values()) < 2**16 else "<u4")
    result = TokenFile(folder / "tokens.bin", dtype.str, 0, 0)
    total = sum(source.stat().st_size for source in job.sources if isinstance(source, Path))
    counter = UnknownCounter(job.backend)
    shows_bar = progress and is_terminal()
    bar = tqdm(total=total or None, desc=f"tokenize {job.corpus}", unit="B", unit_scale=True, disable=not shows_bar)
    with (
        result.path.open("wb") as tokens,
        result.starts_path.open("wb") as starts,
        result.sizes_path.open("wb") as sizes,
        bar,
    ):
        for source in job.sources:
            for batch in read_documents(source, job.text_column):
                sizes.write(np.array([len(text.encode()) for text in batch.texts], dtype=STARTS_DTYPE).data)
                for ids, lengths in _encode_documents(batch.texts, job.backend, job.end_of_text, counter):
                    tokens.write(np.array(ids, dtype=dtype).data)
                    ends = np.cumsum(lengths)
                    starts.write((result.num_tokens + ends - lengths).astype(STARTS_DTYPE).data)
                    result = replace(
                        result,
                        num_tokens=result.num_tokens + len(ids),
                        num_documents=result.num_documents + len(lengths),
                    )
                bar.update(batch.num_bytes)
        # The entry is renamed next; after a power loss an existing entry must have its content.
        for file in (tokens, starts, sizes):
            file.flush()
            os.fsync(file.fileno())
    if result.num_documents == 0:
        raise DataError(f"no text in {', '.join(map(str, job.sources))}; expected at least one line that is not blank")
    if progress and not shows_bar:
        say(f"tokenized {job.corpus}: {result.num_tokens:,} tokens of {result.num_documents:,} documents")
    return replace(result, unknown=counter.total)


def _encode_documents(
    texts: Iterable[str], backend: Tokenizer, end_of_text: int | None, counter: UnknownCounter | None = None
) -> Iterator[tuple[list[int], list[int]]]:
    """(concatenated ids of some documents, number of tokens of each); `counter` does not see `end_of_text`."""
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


def _find_unknown_id(backend: Tokenizer) -> int:
    """The id of unknown tokens; -1, which no token has, if the tokenizer knows every byte."""
    model = json.loads(backend.to_str())["model"]
    token = model.get("unk_token")
    unknown_id = model.get("unk_id")
    if unknown_id is None and token is not None:
        unknown_id = backend.token_to_id(token)
    return -1 if unknown_id is None else int(unknown_id)
