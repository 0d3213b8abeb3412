"""Tokenization: text to token files, cached by the content of the text and the tokenizer's settings.

The cache has one folder `parts/<key>` per part of a corpus (`parts`, `part_writer`), and one file `<corpus>-<key>.json`
per corpus, which lists its parts. The file is written when all of them are complete. Parts are found by their content:
a corpus that gains a file, or a start after an interruption, makes only what is not there.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash
from tokenizers import Tokenizer
from tqdm import tqdm

from das_ds.data.corpus import read_documents
from das_ds.data.encoder import DocumentEncoder, UnknownTokens
from das_ds.data.part_writer import PartJob, read_part, remove_abandoned, write_parts
from das_ds.data.parts import Part, divide_sources
from das_ds.data.sources import FileVersion, Source, fingerprint, resolve_source
from das_ds.data.token_file import TokenCorpus
from das_ds.errors import DataError, ModelError
from das_ds.progress import is_terminal, say
from das_ds.storage import replace_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
UNKNOWN_WARNING = 0.01
UNKNOWN_LIMIT = 0.5
"""Fractions of unknown tokens above which a text causes a warning, and an error."""
PARTS_FOLDER = "parts"


@dataclass(frozen=True)
class _Tokenization:
    """The inputs of one cache entry."""

    corpus: str
    sources: Sequence[Source]
    versions: Mapping[Source, FileVersion]
    """Of the sources that are files."""
    text_column: str
    backend: Tokenizer
    end_of_text: int | None
    cache_dir: Path

    @property
    def entry_name(self) -> str:
        """`<corpus>-<key>`; the key covers everything that shapes the tokens."""
        contents = [self._content(source) for source in self.sources]
        return f"{self.corpus}-{_hash([*self._settings, contents])}"

    @property
    def entry_path(self) -> Path:
        """The file that lists the parts."""
        return self.cache_dir / f"{self.entry_name}.json"

    @property
    def parts_folder(self) -> Path:
        """Folder of the parts of all corpora."""
        return self.cache_dir / PARTS_FOLDER

    @property
    def _settings(self) -> list[object]:
        return [FORMAT_VERSION, self.text_column, self.end_of_text, self.backend.to_str()]

    def jobs(self) -> list[PartJob]:
        """All parts of the corpus."""
        settings = _hash(self._settings)

        def folder(part: Part) -> Path:
            contents = [(self._content(piece.source), piece.first, piece.stop) for piece in part]
            return self.parts_folder / _hash([settings, contents])

        return [
            PartJob(folder(part), part, self.text_column, self._versions_of(part))
            for part in divide_sources(self.sources)
        ]

    def _content(self, source: Source) -> str:
        version = self.versions.get(source)
        return fingerprint(source) if version is None else version.fingerprint

    def _versions_of(self, part: Part) -> tuple[FileVersion, ...]:
        return tuple(self.versions[piece.source] for piece in part if piece.source in self.versions)


def _hash(values: Sequence[object]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values).encode())


def prepare_tokens(
    sources: Sequence[str],
    *,
    corpus: str,
    text_column: str,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    progress: bool,
    end_of_text: int | None = None,
    num_processes: int = 1,
) -> TokenCorpus:
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
        num_processes: processes that tokenize; 1: this one.

    Raises:
        DataError: text that cannot be read or is empty, or a cache folder that cannot be written; names the corpus.
        ModelError: the tokenizer is not a fast one.
    """
    backend = build_backend(tokenizer)
    with _name_corpus(corpus):
        resolved = [source for name in sources for source in resolve_source(name)]
        files = [source for source in resolved if isinstance(source, Path)]
        versions: dict[Source, FileVersion] = {file: FileVersion.identify(file) for file in files}
        job = _Tokenization(corpus, resolved, versions, text_column, backend, end_of_text, cache_dir)
        tokens = _read_entry(job)
        if tokens is None:
            tokens = _write_entry(job, num_processes, progress)
        unknown = tokens.unknown
        if progress:
            level = logging.WARNING if unknown.fraction > UNKNOWN_WARNING else logging.INFO
            percent = f"{unknown.fraction:.2%}"
            logger.log(level, "corpus '%s': %d tokens, %s of the text's unknown", corpus, tokens.num_tokens, percent)
        check_unknown_tokens(unknown)
    return tokens


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
    encoder = DocumentEncoder(build_backend(tokenizer), end_of_text)
    num_tokens = 0
    for source in sources:
        for batch in read_documents(source, text_column):
            # One by one: the first document, or a part of it, may be enough.
            for encoded in (encoded for text in batch.texts for encoded in encoder.encode([text])):
                num_tokens += len(encoded.ids) // encoder.dtype.itemsize
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


def _read_entry(job: _Tokenization) -> TokenCorpus | None:
    """The cache entry; None if it, or one of its parts, is missing or damaged."""
    try:
        folders = [job.parts_folder / name for name in json.loads(job.entry_path.read_text())["parts"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return _join_parts(job.entry_name, folders)


def _join_parts(name: str, folders: Sequence[Path]) -> TokenCorpus | None:
    files = [file for folder in folders if (file := read_part(folder)) is not None]
    if len(files) < len(folders):
        return None
    # A part of blank lines has no token.
    return TokenCorpus(name, tuple(file for file in files if file.num_tokens > 0) or tuple(files))


def _write_entry(job: _Tokenization, num_processes: int, progress: bool) -> TokenCorpus:
    started = time.monotonic()
    try:
        job.cache_dir.mkdir(parents=True, exist_ok=True)
        jobs = job.jobs()
        new = list({one.folder: one for one in jobs if read_part(one.folder) is None}.values())
        num_new_tokens = _write_new_parts(job, new, num_processes, progress)
        tokens = _join_parts(job.entry_name, [one.folder for one in jobs])
        if tokens is None:
            raise DataError(f"{job.parts_folder}: a part is gone that was just written; leave the cache in place")
        if tokens.num_documents == 0:
            raise DataError(
                f"no text in {', '.join(map(str, job.sources))}; expected at least one line that is not blank"
            )
        content = {"sources": list(map(str, job.sources)), "parts": [one.folder.name for one in jobs]}
        replace_file(job.entry_path, json.dumps(content, indent=1))
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"cannot write tokens in {job.cache_dir} ({reason}); free space there or set data.cache_dir"
        ) from error
    return replace(tokens, num_new_tokens=num_new_tokens, seconds=time.monotonic() - started)


def _write_new_parts(job: _Tokenization, new: Sequence[PartJob], num_processes: int, progress: bool) -> int:
    """Tokenize the parts that are not in the cache; returns the number of their tokens."""
    remove_abandoned(job.parts_folder)
    total = sum(piece.num_bytes for one in new for piece in one.part)
    shows_bar = progress and is_terminal()
    num_tokens = 0
    num_documents = 0
    num_unproven_cuts = 0
    bar = tqdm(total=total or None, desc=f"tokenize {job.corpus}", unit="B", unit_scale=True, disable=not shows_bar)
    try:
        with bar:
            for written in write_parts(new, job.backend, job.end_of_text, num_processes, bar.update):
                num_tokens += written.token_file.num_tokens
                num_documents += written.token_file.num_documents
                num_unproven_cuts += written.num_unproven_cuts
    except BaseException:
        # Processes that were ended while they wrote: their files may be what fills the disk.
        remove_abandoned(job.parts_folder)
        raise
    if num_unproven_cuts:
        logger.warning(
            "corpus '%s': documents of more than a million characters were cut at %d places that may change a token "
            "(long stretches without spaces, or a tokenizer that does not split at spaces)",
            job.corpus,
            num_unproven_cuts,
        )
    if progress and not shows_bar:
        say(f"tokenized {job.corpus}: {num_tokens:,} tokens of {num_documents:,} documents")
    return num_tokens
