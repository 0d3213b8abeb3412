"""Text stream: the documents of a corpus, shard after shard and epoch after epoch, from any position in it.

A shard is what can be read by itself: a range of about 64 MiB of a local text or parquet file, a compressed file, or a
shard (usually a file) of a hub dataset. Every epoch reads all shards, in an order that follows from the seed and the
number of the epoch; within a shard documents come as stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from das_ds.data.corpus import count_hub_shards, read_documents
from das_ds.data.parts import SourceRange, divide_source
from das_ds.data.sources import Source, file_suffix, fingerprint
from das_ds.errors import DataError
from das_ds.functional.sampling import epoch_order

SAMPLED_BYTES = 1 << 16
"""Of the beginning and the end of a file; they and its size tell it from other files."""


@dataclass(frozen=True, order=True)
class StreamPosition:
    """A place in a stream of text: that of the next token."""

    epoch: int = 0
    shard: int = 0
    """Place in the order of the epoch."""
    document: int = 0
    """Documents of the shard before it; blank ones do not count."""
    token: int = 0
    """Tokens of the document before it."""


def list_shards(sources: Sequence[Source]) -> tuple[SourceRange, ...]:
    """All shards of the sources, as listed. Files are not read; the hub is asked for the names of its files.

    Raises:
        DataError: a file that cannot be read, or a hub dataset that cannot be streamed.
    """
    shards: list[SourceRange] = []
    for source in sources:
        if isinstance(source, Path):
            shards += divide_source(source)
        else:
            shards += [SourceRange(source, index, index + 1) for index in range(count_hub_shards(source))]
    return tuple(shards)


def identify(source: Source) -> str:
    """Identity of a source that is not read completely: size and ends of a file, name and commit of a dataset.

    Raises:
        DataError: the file cannot be read.
    """
    if not isinstance(source, Path):
        return fingerprint(source)
    try:
        with source.open("rb") as file:
            size = source.stat().st_size
            digest = xxhash.xxh3_128(file.read(SAMPLED_BYTES))
            file.seek(max(0, size - SAMPLED_BYTES))
            digest.update(file.read(SAMPLED_BYTES))
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror or error})") from error
    return f"{size}-{digest.hexdigest()}{file_suffix(source)}"


class StreamReader:
    """Reads a stream from any position; goes on where it was without opening the shard again.

    Args:
        shards: at least one.
        identities: source of a shard -> what it was when the stream was opened, see `identify`.
        text_column: column with the text in .jsonl, .parquet and hub datasets.
        seed: of the order of shards.
        name: of the stream; streams with different names have unrelated orders.
    """

    def __init__(
        self, shards: Sequence[SourceRange], identities: Mapping[Source, str], text_column: str, seed: int, name: str
    ) -> None:
        self._shards = shards
        self._identities = identities
        self._text_column = text_column
        self._seed = seed
        self._name = name
        self._order = lru_cache(maxsize=2)(self._find_order)
        self._opened: _OpenShard | None = None
        self._opened_at = StreamPosition(epoch=-1)

    def read(self, position: StreamPosition) -> Iterator[tuple[StreamPosition, list[str]]]:
        """Batches of documents, each with the position of its first one; endless, and empty at the end of a shard.

        Args:
            position: of the first document; its `token` is not looked at.

        Raises:
            DataError: text that cannot be read.
        """
        place = replace(position, token=0)
        while True:
            while texts := self._read_shard(place):
                yield place, texts
                place = replace(place, document=place.document + len(texts))
            yield place, []
            is_last = place.shard + 1 == len(self._shards)
            place = StreamPosition(place.epoch + is_last, 0 if is_last else place.shard + 1)

    def _read_shard(self, place: StreamPosition) -> list[str]:
        """Documents of a shard from a place on, some of them; [] at its end."""
        try:
            return self._open(place).read(place.document)
        except BaseException:
            # What was interrupted would seem to be at its end.
            self._opened = None
            raise

    def _open(self, place: StreamPosition) -> _OpenShard:
        beginning = StreamPosition(place.epoch, place.shard)
        if self._opened is None or self._opened_at != beginning or self._opened.first > place.document:
            shard = self._shards[int(self._order(place.epoch)[place.shard])]
            self._opened = _OpenShard(shard, self._identities[shard.source], self._text_column)
            self._opened_at = beginning
        return self._opened

    def _find_order(self, epoch: int) -> NDArray[np.int64]:
        return epoch_order(len(self._shards), self._seed, f"shards/{self._name}", epoch)


class _OpenShard:
    """A shard that is read forward.

    Args:
        shard: to read.
        identity: that its source has to have.
        text_column: see `StreamReader`.

    Raises:
        DataError: its source has changed.
    """

    def __init__(self, shard: SourceRange, identity: str, text_column: str) -> None:
        self._source = shard.source
        self._identity = identity
        self._check_unchanged()
        self._batches = iter(read_documents(shard, text_column))
        self._texts: list[str] = []
        self.first = 0
        """Number of the first document that can still be read."""

    def read(self, document: int) -> list[str]:
        """Documents from this number on, some of them; [] at the end of the shard.

        Raises:
            DataError: text that cannot be read, or has changed.
        """
        while document >= self.first + len(self._texts):
            batch = next(self._batches, None)
            if batch is None:
                # A file that was cut short seems to be at its end.
                self._check_unchanged()
                return []
            self.first += len(self._texts)
            self._texts = batch.texts
        return self._texts[document - self.first :]

    def _check_unchanged(self) -> None:
        if identify(self._source) != self._identity:
            raise DataError(
                f"{self._source}: found another size, beginning or end than when the stream was opened, expected text "
                "that does not change while it is streamed; put it back and start again"
            )
