"""Part writer: the token file of one part of a corpus, written at once or not at all, in this or in other processes.

A part is a folder with `tokens.bin` (little-endian uint16 or uint32), `starts.bin` (the index of each document's first
token, little-endian uint64), `sizes.bin` (bytes of each document's text in UTF-8, the same) and `meta.json`. It is
written under another name and renamed when complete. Its writer holds a lock meanwhile, so that what a killed process
left can be told from what another one is writing.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import IO

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from das_ds.data.corpus import read_documents
from das_ds.data.encoder import DocumentEncoder, UnknownTokens
from das_ds.data.parts import Part
from das_ds.data.sources import FileVersion
from das_ds.data.token_file import STARTS_DTYPE, TokenFile, map_file
from das_ds.errors import DataError
from das_ds.storage import sync

PARTIAL_PREFIX = ".partial-"
UNLOCKED_AGE_S = 3600.0
"""Age of a folder without a lock file from which on its writer is taken to be dead."""


@dataclass(frozen=True)
class PartJob:
    """One part to tokenize."""

    folder: Path
    """Where its token file belongs."""
    part: Part
    text_column: str
    versions: tuple[FileVersion, ...] = ()
    """Its files, with the content by which it is found."""


@dataclass(frozen=True)
class WrittenPart:
    """A part that was tokenized."""

    folder: Path
    token_file: TokenFile
    num_unproven_cuts: int


def read_part(folder: Path) -> TokenFile | None:
    """The token file of a part; None if it is missing or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        unknown = UnknownTokens(**meta["unknown"])
        token_file = TokenFile(folder / "tokens.bin", meta["dtype"], meta["num_tokens"], meta["num_documents"], unknown)
        return token_file if token_file.is_intact else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_part(job: PartJob, encoder: DocumentEncoder, update: Callable[[int], object] = lambda _: None) -> WrittenPart:
    """Tokenize a part; keeps the one that another process wrote in the meantime.

    Args:
        job: the part.
        encoder: of its text; its counts are set back to zero.
        update: called with the bytes of the file that were read, if known.

    Raises:
        DataError: text that cannot be read, or has changed since it was identified.
        OSError: the folder cannot be written or is full.
    """
    encoder.reset_counts()
    with partial_folder(job.folder) as partial:
        num_tokens, num_documents = _write_tokens(partial, job, encoder, update)
        for version in job.versions:
            version.check_unchanged()
        token_file = publish(partial, job.folder, encoder, num_tokens, num_documents)
    return WrittenPart(job.folder, token_file, encoder.num_unproven_cuts)


def _write_tokens(
    folder: Path, job: PartJob, encoder: DocumentEncoder, update: Callable[[int], object]
) -> tuple[int, int]:
    """Write the three files; returns the number of tokens and documents."""
    num_tokens = 0
    num_documents = 0
    with open_files(folder) as (tokens, starts, sizes):
        for batch in (batch for piece in job.part for batch in read_documents(piece, job.text_column)):
            sizes.write(text_sizes(batch.texts).data)
            for encoded in encoder.encode(batch.texts):
                tokens.write(encoded.ids)
                ends = num_tokens + np.cumsum(encoded.lengths, dtype=np.int64)
                starts.write((ends - np.array(encoded.lengths, dtype=np.int64)).astype(STARTS_DTYPE).data)
                num_tokens = int(ends[-1]) if len(ends) else num_tokens
                num_documents += len(ends)
            update(batch.num_bytes)
    return num_tokens, num_documents


def text_sizes(texts: Sequence[str]) -> NDArray[np.uint64]:
    """(len(texts),) UTF-8 bytes of each."""
    sizes = [len(text) if text.isascii() else len(text.encode()) for text in texts]
    return np.array(sizes, dtype=STARTS_DTYPE)


@contextmanager
def open_files(folder: Path) -> Iterator[tuple[IO[bytes], IO[bytes], IO[bytes]]]:
    """The files of tokens, starts and sizes of a new part, which are on disk at the end of the block."""
    with (
        (folder / "tokens.bin").open("wb") as tokens,
        (folder / "starts.bin").open("wb") as starts,
        (folder / "sizes.bin").open("wb") as sizes,
    ):
        yield tokens, starts, sizes
        # The folder is renamed next; after a power loss it must have its content.
        for file in (tokens, starts, sizes):
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """A folder next to another one, locked and removed at the end unless it was renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(mkdtemp(dir=folder.parent, prefix=PARTIAL_PREFIX))
    try:
        # `mkdtemp` lets only the owner read; a shared cache follows the umask.
        partial.chmod(_default_mode(folder.parent))
        with (partial / "lock").open("wb") as lock:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _default_mode(folder: Path) -> int:
    return folder.stat().st_mode & 0o777


def publish(partial: Path, folder: Path, encoder: DocumentEncoder, num_tokens: int, num_documents: int) -> TokenFile:
    """Give a written part its name, and return it; keeps the one that another process wrote in the meantime.

    Args:
        partial: folder with the three files.
        folder: where it belongs.
        encoder: that made its tokens, and counted the unknown ones.
        num_tokens, num_documents: that were written.
    """
    written = TokenFile(partial / "tokens.bin", encoder.dtype.str, num_tokens, num_documents, encoder.unknown)
    (partial / "meta.json").write_text(json.dumps({**asdict(written), "path": "tokens.bin"}, indent=1))
    sync(partial / "meta.json")
    (partial / "lock").unlink()
    try:
        partial.rename(folder)
    except OSError:
        # Another process may have published the same part in the meantime; a damaged one is replaced.
        if read_part(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    map_file.cache_clear()
    token_file = read_part(folder)
    assert token_file is not None, f"{folder} was published"
    return token_file


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left in a folder of parts; what is being written stays."""
    for partial in folder.glob(f"{PARTIAL_PREFIX}*"):
        # Another process may remove or publish it at the same time.
        with suppress(OSError):
            if _is_abandoned(partial):
                shutil.rmtree(partial, ignore_errors=True)


def _is_abandoned(partial: Path) -> bool:
    try:
        with (partial / "lock").open("rb") as lock:
            # Fails while the writer lives, and on file systems without locks.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return time.time() - partial.stat().st_mtime > UNLOCKED_AGE_S
    return True


def write_parts(
    jobs: Sequence[PartJob],
    backend: Tokenizer,
    end_of_text: int | None,
    num_processes: int,
    update: Callable[[int], object],
) -> Iterator[WrittenPart]:
    """Tokenize parts, in any order; with one process in this one.

    Args:
        jobs: the parts.
        backend: the tokenizer.
        end_of_text: id of the token that ends each document, see `DocumentEncoder`.
        num_processes: processes that tokenize.
        update: called with numbers of bytes that were read.

    Raises:
        DataError: text that cannot be read or has changed, or a process that was killed.
        OSError: the cache folder cannot be written or is full.
    """
    num_processes = min(num_processes, len(jobs))
    if num_processes <= 1:
        encoder = DocumentEncoder(backend, end_of_text)
        for job in jobs:
            yield write_part(job, encoder, update)
        return
    # A new interpreter in each: a fork of a process with threads, or with a GPU, may hang.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    arguments = (backend.to_str(), end_of_text)
    with ProcessPoolExecutor(num_processes, context, _start_worker, arguments) as executor:
        try:
            for future in as_completed([executor.submit(_write_in_worker, job) for job in jobs]):
                written, num_bytes = future.result()
                update(num_bytes)
                yield written
        except BrokenProcessPool as error:
            raise DataError(
                "a tokenizing process was killed, perhaps for want of memory; finished parts are kept, start again "
                "with fewer processes"
            ) from error
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise


_worker_encoder: DocumentEncoder


def _start_worker(backend_json: str, end_of_text: int | None) -> None:
    global _worker_encoder
    # Ctrl-C reaches all processes of a terminal; the main one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker_encoder = DocumentEncoder(Tokenizer.from_str(backend_json), end_of_text)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write_in_worker(job: PartJob) -> tuple[WrittenPart, int]:
    num_bytes = 0

    def count(more: int) -> None:
        nonlocal num_bytes
        num_bytes += more

    return write_part(job, _worker_encoder, count), num_bytes
