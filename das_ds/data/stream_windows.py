"""Windows: a stream of text as files of equally many tokens, made when they are needed and removed when they were read.

Window k is tokens [k T, (k + 1) T) of the stream, a pure function of the position in the text at which it begins. That
position is kept for every window, so that a window that was removed can be made again without the text before it.

The folder of a stream has a token file `<k>` per window that is there, in the format of `part_writer`, and a small file
`<k>.position.json` per window that was reached. Any number of processes may use it: the first one that needs a window
makes it while others wait (a file lock), and where the file system has no locks the first that is complete is kept.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import xxhash
from tokenizers import Tokenizer

from das_ds.data.encoder import DocumentEncoder
from das_ds.data.part_writer import (
    PARTIAL_PREFIX,
    open_files,
    partial_folder,
    publish,
    read_part,
    remove_abandoned,
    text_sizes,
)
from das_ds.data.parts import SourceRange
from das_ds.data.sources import Source, resolve_source
from das_ds.data.text_stream import StreamPosition, StreamReader, identify, list_shards
from das_ds.data.token_file import STARTS_DTYPE, TokenFile
from das_ds.data.tokenize import FORMAT_VERSION, UNKNOWN_LIMIT, build_backend, check_unknown_tokens
from das_ds.errors import DataError
from das_ds.storage import replace_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

STREAMS_FOLDER = "streams"
WINDOWS_AHEAD = 2
"""Windows that are made ahead of the one that training reads."""
POSITION_SUFFIX = ".position.json"


@dataclass(frozen=True)
class StreamSpec:
    """All that decides the windows of a stream, and where they are."""

    corpus: str
    """Name of the corpus, for messages and the order of shards."""
    name: str
    """Of the text and its tokens, see `TokenCorpus.name`."""
    folder: Path
    shards: tuple[SourceRange, ...]
    identities: Mapping[Source, str]
    """Source of a shard -> what it was at the start, see `identify`."""
    text_column: str
    tokenizer: str
    """In JSON."""
    end_of_text: int | None
    """Id of the token that ends each document, see `DocumentEncoder`."""
    seed: int
    """Of the order of shards."""
    num_tokens: int
    """Of a window, T."""


class TokenStream:
    """The windows of a stream.

    Args:
        spec: of the stream.
    """

    def __init__(self, spec: StreamSpec) -> None:
        self.spec = spec
        self._reader = StreamReader(spec.shards, spec.identities, spec.text_column, spec.seed, spec.corpus)
        self._encoder: DocumentEncoder | None = None

    def __reduce__(self) -> tuple[type[Self], tuple[StreamSpec]]:
        # Another process opens the text itself.
        return type(self), (self.spec,)

    def find(self, window: int) -> TokenFile | None:
        """A window that is there; None if it is not, or damaged."""
        return read_part(self._folder(window))

    def require(self, window: int) -> TokenFile:
        """A window, which is made if it is not there.

        Raises:
            DataError: text that cannot be read or has no tokens, or a cache folder that cannot be written; names the
                corpus.
        """
        found = self.find(window)
        if found is not None:
            return found
        try:
            self.spec.folder.mkdir(parents=True, exist_ok=True)
            with self._lock():
                # Another process may have made it meanwhile.
                return self.find(window) or self._make_up_to(window)
        except DataError as error:
            raise DataError(f"corpus '{self.spec.corpus}': {error}") from error
        except OSError as error:
            raise DataError(
                f"corpus '{self.spec.corpus}': cannot write tokens in {self.spec.folder} ({error.strerror or error}); "
                "free space there or set data.cache_dir"
            ) from error

    def position(self, window: int) -> StreamPosition | None:
        """Where a window begins in the text; None if it was not reached, or the file that says so is damaged."""
        if window == 0:
            return StreamPosition()
        try:
            position = StreamPosition(**json.loads(self._position_path(window).read_text()))
        except (OSError, ValueError, TypeError):
            return None
        is_count = all(type(number) is int and number >= 0 for number in asdict(position).values())
        return position if is_count and position.shard < len(self.spec.shards) else None

    def remember(self, window: int, position: StreamPosition) -> None:
        """Note where a window begins, as a checkpoint knows it; what is noted already stays.

        Raises:
            DataError: the cache folder cannot be written.
        """
        if self.position(window) is not None:
            return
        try:
            self.spec.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self._position_path(window), json.dumps(asdict(position)))
        except OSError as error:
            raise DataError(
                f"corpus '{self.spec.corpus}': cannot write in {self.spec.folder} ({error.strerror or error}); free "
                "space there or set data.cache_dir"
            ) from error

    def remove(self, windows: Iterable[int]) -> None:
        """Remove windows that are there; they can be made again."""
        for window in windows:
            removed = self._folder(window).with_name(f"{PARTIAL_PREFIX}removed-{window}")
            # Another process may remove it at the same time.
            with suppress(OSError):
                self._folder(window).rename(removed)
            shutil.rmtree(removed, ignore_errors=True)

    def _folder(self, window: int) -> Path:
        return self.spec.folder / f"{window:08d}"

    def _position_path(self, window: int) -> Path:
        return self.spec.folder / f"{window:08d}{POSITION_SUFFIX}"

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Only one process makes windows at a time, where the file system has locks."""
        with (self.spec.folder / "lock").open("wb") as lock:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_up_to(self, window: int) -> TokenFile:
        remove_abandoned(self.spec.folder)
        first = next(number for number in range(window, -1, -1) if self.position(number) is not None)
        if first < window:
            logger.warning(
                "corpus '%s': the position of window %d is not in %s; the stream is read again from window %d on",
                self.spec.corpus,
                window,
                self.spec.folder,
                first,
            )
        for number in range(first, window):
            was_there = self.find(number) is not None
            self._make(number)
            if not was_there:
                self.remove([number])
        return self._make(window)

    def _make(self, window: int) -> TokenFile:
        """Write a window, and where the next one begins."""
        position = self.position(window)
        assert position is not None, f"window {window} was not reached"
        if self._encoder is None:
            self._encoder = DocumentEncoder(Tokenizer.from_str(self.spec.tokenizer), self.spec.end_of_text)
        # A window follows from its position alone, whichever windows this process has made before.
        self._encoder.restart()
        with partial_folder(self._folder(window)) as folder:
            end, num_documents = self._write(folder, position, self._encoder)
            self._check_unknown(window, self._encoder)
            if end.epoch > position.epoch:
                logger.info("corpus '%s': the stream began again in window %d", self.spec.corpus, window)
            # Before the window itself: who has read it finds the next one.
            replace_file(self._position_path(window + 1), json.dumps(asdict(end)))
            return publish(folder, self._folder(window), self._encoder, self.spec.num_tokens, num_documents)

    def _check_unknown(self, window: int, encoder: DocumentEncoder) -> None:
        if window == 0:
            check_unknown_tokens(encoder.unknown)
        elif encoder.unknown.fraction > UNKNOWN_LIMIT:
            percent = f"{encoder.unknown.fraction:.1%}"
            logger.warning("corpus '%s': found %s unknown tokens in window %d", self.spec.corpus, percent, window)

    def _write(self, folder: Path, begin: StreamPosition, encoder: DocumentEncoder) -> tuple[StreamPosition, int]:
        """Write the tokens from a position on; returns the position after them, and how many documents begin in them.

        Raises:
            DataError: text that cannot be read, or an epoch without a token.
        """
        num_tokens = 0
        num_documents = 0
        last_epoch = begin.epoch
        with open_files(folder) as (tokens, starts, sizes):
            for place, texts in self._reader.read(begin):
                if place.epoch > last_epoch + 1:
                    sources = ", ".join(sorted({str(shard.source) for shard in self.spec.shards})[:3])
                    raise DataError(f"no text in {sources}; expected at least one line that is not blank")
                num_bytes = text_sizes(texts)
                # The document of the batch that the next token is of, and how many of its tokens came before.
                document = 0
                begun = 0
                skipped = begin.token if num_tokens == 0 and place == replace(begin, token=0) else 0
                for encoded in encoder.encode(texts):
                    ids = np.frombuffer(encoded.ids, encoder.dtype)
                    # Where documents begin, relative to the ids; the first may have begun before, the last has no
                    # token yet unless the ids end within it.
                    begins = np.cumsum([0, *encoded.lengths], dtype=np.int64) - begun
                    low = int(np.clip(begins[0] + skipped, 0, len(ids))) if document == 0 else 0
                    high = min(len(ids), low + self.spec.num_tokens - num_tokens)
                    is_new = (begins >= low) & (begins < high)
                    tokens.write(ids[low:high].data)
                    starts.write((begins[is_new] - low + num_tokens).astype(STARTS_DTYPE).data)
                    sizes.write(num_bytes[document : document + len(begins)][is_new[: len(num_bytes) - document]].data)
                    num_tokens += high - low
                    num_documents += int(is_new.sum())
                    last_epoch = place.epoch if high > low else last_epoch
                    if num_tokens == self.spec.num_tokens:
                        number = int(np.searchsorted(begins, high, side="right")) - 1
                        next_document = place.document + document + number
                        return replace(place, document=next_document, token=high - int(begins[number])), num_documents
                    document += len(encoded.lengths)
                    begun = len(ids) - int(begins[-1])
        raise AssertionError("a stream has no end")


def open_stream(
    sources: Sequence[str],
    *,
    corpus: str,
    text_column: str,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    end_of_text: int | None,
    seed: int,
    window_tokens: int,
) -> TokenStream:
    """The stream of some sources; their text is not read yet.

    Args:
        sources: files, globs and hub names.
        corpus: name of the corpus, for messages, the cache entry and the order of shards.
        text_column: column with the text in .jsonl, .parquet and hub datasets.
        tokenizer: a fast tokenizer.
        cache_dir: folder of all cache entries.
        end_of_text: id of the token that ends each document; None: only the tokenizer's special tokens.
        seed: of the order of shards.
        window_tokens: tokens of a window.

    Raises:
        DataError: a source that cannot be found or opened; names the corpus.
        ModelError: the tokenizer is not a fast one.
    """
    backend = build_backend(tokenizer).to_str()
    try:
        resolved = [source for name in sources for source in resolve_source(name)]
        shards = list_shards(resolved)
        identities = {source: identify(source) for source in resolved}
    except DataError as error:
        raise DataError(f"corpus '{corpus}': {error}") from error
    contents = [identities[source] for source in resolved]
    key = _hash([FORMAT_VERSION, text_column, end_of_text, backend, contents])
    return TokenStream(
        StreamSpec(
            corpus=corpus,
            name=f"{corpus}-{key}",
            folder=cache_dir / STREAMS_FOLDER / f"{corpus}-{_hash([key, corpus, seed, window_tokens])}",
            shards=shards,
            identities=identities,
            text_column=text_column,
            tokenizer=backend,
            end_of_text=end_of_text,
            seed=seed,
            num_tokens=window_tokens,
        )
    )


def _hash(values: Sequence[object]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values).encode())


def remove_ahead(stream: TokenStream, window: int) -> None:
    """Remove what `keep_ahead` has left for training that has ended at a window; the first window stays."""
    stream.remove(range(max(1, window - 1), window + WINDOWS_AHEAD + 1))
    remove_abandoned(stream.spec.folder)


def keep_ahead(stream: TokenStream, previous: int, window: int) -> Iterator[int]:
    """Windows to make for training that has come from one window to another; those it has passed are removed.

    At most WINDOWS_AHEAD + 2 windows are there at once, and the first one, on which methods measure, and which is
    replayed.

    Args:
        stream: of the windows.
        previous: window that training was at before.
        window: that it is at now.
    """
    # The one before may still be read by a rank or a loader worker that is a step behind.
    stream.remove(range(max(1, previous - 1), window - 1))
    for number in range(window, window + WINDOWS_AHEAD + 1):
        if stream.find(number) is None:
            yield number
