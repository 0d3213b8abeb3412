"""Storage: atomic, durable writes of files and folders, checksums, and versioned JSON files.

Atomic: a reader finds the old content or the new, never a part. Durable: content survives a loss of power.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from das_ds.errors import RunFolderError

CHECKSUM = "sha256"
CHECKSUM_FILE = "SHA256SUMS"
"""Checksums of a folder's files in the format of `sha256sum --check`."""
MODEL_CARD = "README.md"
"""For readers, who may edit it: has no checksum."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path to write to, which replaces `path` at the end of the block, after it is flushed to disk.

    Raises:
        OSError: the disk is full, or the folder cannot be written; `path` is unchanged.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        # Some libraries replace this file by one that only its owner may read.
        partial.chmod(mode)
        # Content first, then the name, then the folder's entry: in this order nothing half-written can appear.
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace_file(path: Path, content: str) -> None:
    """Write a small text file that several processes may write at once: the last one's content stays, complete.

    Raises:
        OSError: the disk is full, or the folder cannot be written; `path` is unchanged.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # `mkstemp` lets only the owner read; others of the folder may need it too.
        partial.chmod(path.parent.stat().st_mode & 0o666)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def link_file(source: Path, path: Path) -> None:
    """Give a file a second name, replacing an existing file; a copy where the file system has no hard links.

    Raises:
        OSError: the disk is full, or the folder cannot be written; `path` is unchanged.
    """
    with atomic_write(path) as partial:
        partial.unlink(missing_ok=True)
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)
    # os.replace does nothing if both names were links to the same file already, and leaves the partial one.
    path.with_name(path.name + ".partial").unlink(missing_ok=True)


@contextmanager
def atomic_dir(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which replaces `folder` at the end of the block, with checksums of its files.

    Raises:
        OSError: the disk is full, or the parent cannot be written; `folder` is unchanged.
    """
    staged = StagedDir(folder)
    try:
        staged.create()
        yield staged.partial
        staged.publish()
    except BaseException:
        staged.discard()
        raise


class StagedDir:
    """A folder that is filled under another name, by one process or by several, and then takes its own name at once.

    One process calls `create` before the others write and `publish` after they have; a folder that was not published
    is removed by the next `create`.

    Args:
        folder: its own name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.partial = folder.with_name(folder.name + ".partial")
        """Where to write."""

    def create(self) -> None:
        """Make the empty folder to fill.

        Raises:
            OSError: the parent cannot be written.
        """
        self.discard()
        self.partial.mkdir(parents=True)

    def publish(self, checksums: Mapping[str, str] | None = None) -> None:
        """Replace `folder` by what was written, with checksums of its files.

        Args:
            checksums: file -> its checksum, of those that need not be read again.

        Raises:
            OSError: the disk is full, or the parent cannot be written; `folder` is unchanged.
        """
        write_checksums(self.partial, checksums)
        _give_modes(self.partial)
        sync_all(self.partial)
        old = self.folder.with_name(self.folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        # A folder cannot be replaced by a rename unless it is empty, so the old one is moved away first.
        if self.folder.exists():
            os.replace(self.folder, old)
        os.replace(self.partial, self.folder)
        sync(self.folder.parent)
        shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.partial, ignore_errors=True)


def _give_modes(folder: Path) -> None:
    """Give every file of a folder the mode that the umask (or the folder's ACL) gave the file of checksums."""
    mode = (folder / CHECKSUM_FILE).stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def write_json_with_checksum(path: Path, content: dict[str, Any]) -> None:
    """Write an object as JSON with a checksum of itself, replacing an existing file.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    with atomic_write(path) as partial:
        partial.write_text(json.dumps({CHECKSUM: _digest(content), **content}, indent=1) + "\n", encoding="utf-8")


def read_json_with_checksum(path: Path) -> dict[str, Any]:
    """The object that `write_json_with_checksum` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file, or was altered; the message says which.
    """
    try:
        content = json.loads(path.read_bytes())
        digest = content.pop(CHECKSUM)
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"is no JSON object with a {CHECKSUM}: {error}") from error
    if digest != _digest(content):
        raise ValueError(f"was altered: its {CHECKSUM} differs")
    return dict(content)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """Flush a folder and everything in it to disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def checksum(path: Path) -> str:
    """SHA-256 of a file's content in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Record every file of a folder but its model card in its `CHECKSUM_FILE`.

    Args:
        folder: to be described.
        known: file -> its checksum, of those that need not be read.
    """
    digests = dict(known or {})
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name not in (CHECKSUM_FILE, MODEL_CARD)
    )
    names = {path.relative_to(folder).as_posix(): path for path in files}
    lines = [f"{digests.get(name) or checksum(path)}  {name}\n" for name, path in names.items()]
    (folder / CHECKSUM_FILE).write_text("".join(lines), encoding="utf-8")


def find_corrupted(folder: Path) -> list[str]:
    """Files of a folder that are missing or do not match its `CHECKSUM_FILE`; [] where it has none."""
    record = folder / CHECKSUM_FILE
    if not record.exists():
        return []
    expected = [line.split("  ", 1) for line in record.read_text(encoding="utf-8").splitlines()]
    return [name for digest, name in expected if not (folder / name).is_file() or checksum(folder / name) != digest]


T = TypeVar("T", bound="VersionedJson")


class Section(BaseModel):
    """Base of JSON schemas: frozen, no unknown keys, every number finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class VersionedJson(Section):
    """Content of a JSON file; subclasses have a field `format_version` whose default is the only allowed value."""

    what: ClassVar[str]
    """Contents of the file, for messages."""

    def write(self, path: Path) -> None:
        """Write as JSON, atomically.

        Raises:
            RunFolderError: the folder cannot be written or is full.
        """
        try:
            write_json_with_checksum(path, self.model_dump(mode="json"))
        except OSError as error:
            raise RunFolderError(
                f"{path}: cannot be written ({error.strerror}); its folder must exist, be writable and have free space"
            ) from error

    @classmethod
    def read(cls: type[T], path: Path) -> T:
        """Read what `write` wrote.

        Raises:
            RunFolderError: the file cannot be read, is not such a file, was altered, or has another format version.
        """
        try:
            content = read_json_with_checksum(path)
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be read ({error.strerror}); expected {cls.what}") from error
        except ValueError as error:
            raise RunFolderError(f"{path}: {error}; expected {cls.what}") from error
        found = content.get("format_version")
        expected = cls.model_fields["format_version"].default
        if found != expected:
            raise RunFolderError(f"{path}: found format_version {found}, expected {cls.what}, {expected}")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise RunFolderError(f"{path}: {_problems(error)}; expected {cls.what}") from error


def _problems(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, found['loc'])) or 'file'}: {found['msg']}" for found in error.errors())
