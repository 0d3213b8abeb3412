"""Paths and files that a user names: expanded by one rule, opened only where a regular file can be read.

Everything here fails with an `OSError` or `ValueError` whose text says what was found and what is expected, so that
each caller can name its key and raise its own kind of `DasError`.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

LFS_HEADER = b"version https://git-lfs.github.com/spec/v1"
BYTE_ORDER_MARK = "\ufeff"
_VARIABLE = re.compile(r"\$(?:\{(?P<braced>[^}]*)\}|(?P<plain>[A-Za-z_][A-Za-z0-9_]*))")
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class UnusableFileError(OSError):
    """A file that exists but is not what it has to be; `strerror` says what it is."""

    def __init__(self, reason: str) -> None:
        super().__init__(errno.EINVAL, reason)

    def __str__(self) -> str:
        return str(self.strerror)


class NotTextError(UnusableFileError):
    """A file that is not UTF-8; `strerror` names the line and the byte."""


def expand_path(text: str) -> str:
    """A path with `~` at its beginning, `$NAME` and `${NAME}` replaced as a shell would.

    Raises:
        ValueError: a variable that is not set, a user without home folder, or a character that no path has.
    """
    if "\0" in text:
        raise ValueError(f"found {text!r} with a NUL character, expected a path")
    expanded = _VARIABLE.sub(lambda match: _value_of(match, text), text)
    # What is recorded in config.yaml is read again, and has to mean the same then.
    if expanded != text and _VARIABLE.search(expanded):
        raise ValueError(f"found {text!r}, which gives {expanded!r} with a variable again, expected a plain path")
    if not expanded.startswith("~"):
        return expanded
    home = os.path.expanduser(expanded)
    if home.startswith("~"):
        user = expanded.partition("/")[0]
        raise ValueError(f"found {text!r}, but {user} has no home folder here (HOME is not set); write the whole path")
    return home


def require_file(path: Path) -> None:
    """Check that a path is a regular file with content of its own.

    Raises:
        OSError: there is no such file, or it cannot be read.
        UnusableFileError: it is a folder, pipe, socket or device, or a Git LFS pointer.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        found = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise UnusableFileError(f"is {found}, expected a regular file")
    if is_lfs_pointer(path):
        raise UnusableFileError("is a Git LFS pointer and not the file itself; fetch it with: git lfs pull")


def is_lfs_pointer(path: Path) -> bool:
    """Whether a regular file holds no content but the pointer that Git LFS leaves in its place.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return file.read(len(LFS_HEADER)) == LFS_HEADER


def find_lfs_pointers(folder: Path, *patterns: str) -> list[str]:
    """Names of the files of a folder that match one of the patterns and are Git LFS pointers."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.name for path in found if is_lfs_pointer(path))


def read_text(path: Path) -> str:
    """A small file of text in UTF-8, without byte-order mark, every line ending as a newline.

    Raises:
        OSError: there is no such file, or it cannot be read.
        UnusableFileError: it is no regular file, a Git LFS pointer, or not UTF-8; names the line.
    """
    require_file(path)
    return "\n".join([*decode_lines(path.read_bytes()), ""])


def decode_lines(block: bytes, num_lines: int = 0) -> list[str]:
    """Lines of UTF-8, which end in LF, CR LF or CR, without those ends and without the file's byte-order mark.

    Args:
        block: whole lines of a file.
        num_lines: lines of the file before them.

    Raises:
        NotTextError: some byte is not UTF-8; names the line.
    """
    try:
        text = block.decode()
    except UnicodeDecodeError as error:
        line = num_lines + len(decode_lines(block[: error.start] + b"."))
        raise NotTextError(f"line {line}: found byte 0x{block[error.start]:02x}, expected UTF-8") from None
    # Some editors begin a file with a byte-order mark, which is no part of the text.
    text = text if num_lines else text.removeprefix(BYTE_ORDER_MARK)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.removesuffix("\n").split("\n")


def _value_of(match: re.Match[str], text: str) -> str:
    name = match["plain"] if match["braced"] is None else match["braced"]
    if name not in os.environ:
        raise ValueError(f"found {text!r}, but the variable {name or 'of no name'} is not set")
    return os.environ[name]
