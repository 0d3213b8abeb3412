"""Text sources: tells local files, globs and hub datasets apart, resolves and fingerprints them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from glob import escape, glob
from pathlib import Path

import xxhash

from das_ds.errors import DataError
from das_ds.hub import HubError, find_commit, is_local_path

FILE_SUFFIXES = (".txt", ".txt.gz", ".txt.xz", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")
HUB_NAME = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<config>[\w.+-]+))?(@(?P<split>[\w.-]+))?(#(?P<revision>[\w./-]+))?"
)
HUB_FORM = "owner/name[:config][@split][#revision]"


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset on the Hugging Face hub, at a fixed revision."""

    repo: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        return f"{self.repo}{config}@{self.split}"


Source = Path | HubDataset


def file_suffix(path: Path) -> str:
    """The supported suffix of a file name.

    Raises:
        DataError: unknown suffix; the supported ones are listed.
    """
    for suffix in FILE_SUFFIXES:
        if path.name.lower().endswith(suffix):
            return suffix
    raise DataError(f"{path}: unknown file type; allowed are {', '.join(FILE_SUFFIXES)}")


def resolve_source(name: str) -> list[Source]:
    """The files that a name refers to (sorted if it is a glob), or a hub dataset at the commit of its revision.

    `owner/name` without a file suffix is a hub dataset unless such a path exists; with `:config`, `@split` or
    `#revision` it always is one.

    Raises:
        DataError: missing file, glob without match, folder, unknown file type, or a hub that does not answer.
    """
    return [_pin_revision(source) if isinstance(source, HubDataset) else source for source in _list_sources(name)]


def _list_sources(name: str) -> list[Source]:
    """The sources that a name refers to, without asking the hub."""
    try:
        hub_name = parse_hub_name(name)
        if hub_name is not None:
            return [hub_name]
        paths = _match_paths(name)
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error})") from error
    if not paths:
        raise DataError(f"{name}: found no such file; expected a file, a glob with a match, or a hub name {HUB_FORM}")
    for path in paths:
        if path.is_dir():
            raise DataError(f"{path}: found a folder; expected files, for instance {path / '*.txt'}")
        file_suffix(path)
        if path.exists() and not path.is_file():
            raise DataError(
                f"{path}: found a pipe, socket or device; expected a regular file, because text is read several times"
            )
    return list(paths)


def find_shared_sources(first: Iterable[str], second: Iterable[str]) -> list[Source]:
    """Sources that both groups of names refer to: files (also by other names or links) and splits of hub datasets.

    Raises:
        DataError: a file that cannot be found; the hub is not asked.
    """
    second_sources = {_resolve_links(source) for name in second for source in _list_sources(name)}
    return [source for name in first for source in _list_sources(name) if _resolve_links(source) in second_sources]


def _resolve_links(source: Source) -> Source:
    return source.resolve() if isinstance(source, Path) else source


def _match_paths(name: str) -> list[Path]:
    """The files of a path or glob; the folders of a glob may have brackets in their real names."""
    path = Path(name)
    if path.exists():
        return [path]
    return sorted(Path(match) for match in glob(_escape_existing_folders(path), recursive=True))


def _escape_existing_folders(path: Path) -> str:
    """The glob with its longest leading path that exists literally escaped."""
    for parent in path.parents:
        if parent.exists():
            return str(Path(escape(str(parent))) / path.relative_to(parent))
    return str(path)


def parse_hub_name(name: str) -> HubDataset | None:
    """The hub dataset of a name, or None if the name refers to files."""
    match = HUB_NAME.fullmatch(name)
    if match is None or is_local_path(name):
        return None
    repo, config, split, revision = match.group("repo", "config", "split", "revision")
    # `corpora/train.txt` also matches HUB_NAME; versions such as `owner/web-1.0` end in digits.
    ends_like_file = re.search(r"\.[A-Za-z]\w*$", repo) is not None
    if ends_like_file and config is None and split is None and revision is None:
        return None
    return HubDataset(repo, config, split or "train", revision)


def _pin_revision(source: HubDataset) -> HubDataset:
    try:
        return replace(source, revision=find_commit("dataset", source.repo, source.revision))
    except HubError as error:
        raise DataError(
            f"{source.repo}: {error}; expected a file, a glob with a match, or a hub name {HUB_FORM}"
        ) from error


def fingerprint(source: Source) -> str:
    """Identity of a source's content: hash and suffix of a file, or name and revision of a hub dataset.

    Raises:
        DataError: the file cannot be read.
    """
    if isinstance(source, HubDataset):
        return f"{source}#{source.revision}"
    try:
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror or error})") from error
    return f"{digest}{file_suffix(source)}"


@dataclass(frozen=True)
class FileVersion:
    """A file with the content that it had when it was identified."""

    path: Path
    fingerprint: str
    stamp: tuple[int, ...]
    """Inode, size and time of the last change, from before the content was read."""

    @classmethod
    def identify(cls, path: Path) -> FileVersion:
        """The present version; reads the file.

        Raises:
            DataError: the file cannot be read.
        """
        stamp = _stamp(path)
        return cls(path, fingerprint(path), stamp)

    def check_unchanged(self) -> None:
        """Check that the file still has this content; reads it again only if its stamp is another one.

        Raises:
            DataError: it has other content, or cannot be read.
        """
        if _stamp(self.path) != self.stamp and fingerprint(self.path) != self.fingerprint:
            raise DataError(
                f"{self.path}: found other content than when it was first read, expected a file that does not change "
                "while it is tokenized; start again"
            )


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    return status.st_ino, status.st_size, status.st_mtime_ns
