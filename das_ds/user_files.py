"""Paths and files named by the user: expands paths, checks that files are regular, decodes text.

All functions raise `OSError` or `ValueError` with the value found and the value expected, so that each caller can add
its key and raise its own `DasError`.
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
    """A file of the wrong kind; `strerror` says which."""

    def __init__(self, reason: str) -> None:
        super().__init__(errno.EINVAL, reason)

    def __str__(self) -> str:
        return str(self.strerror)


class NotTextError(UnusableFileError):
    """A file that is not UTF-8; `strerror` names the line and the byte."""


def expand_path(text: str) -> str:
    """Expand a leading `~`, `$NAME` and `${NAME}` as a shell does.

    Raises:
        ValueError: a variable that is not set, a user without home folder, or a NUL character.
    """
    if "\0" in text:
        raise ValueError(f"found {text!r} with a NUL character, expected a path")
    expanded = _VARIABLE.sub(lambda match: _expand_variable(match, text), text)
    # The expanded path is recorded in config.yaml and expanded again when that is read; it must not change then.
    if expanded != text and _VARIABLE.search(expanded):
        raise ValueError(f"found {text!r}, which gives {expanded!r} with a variable again, expected a plain path")
    if not expanded.startswith("~"):
        return expanded
    home = os.path.expanduser(expanded)
    if home.startswith("~"):
        user = expanded.partition("/")[0]
        raise ValueError(f"found {text!r}, but {user} has no home folder here (HOME is not set); write the full path")
    return home


def require_file(path: Path) -> None:
    """Check that a path is a regular file and not a Git LFS pointer.

    Raises:
        OSError: the file does not exist or cannot be read.
        UnusableFileError: it is a folder, pipe, socket or device, or a Git LFS pointer.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        found = _KINDS.get(stat.S_IFMT(mode), "not a regular file")
        raise UnusableFileError(f"is {found}, expected a regular file")
    if is_lfs_pointer(path):
        raise UnusableFileError("is a Git LFS pointer, expected the file itself; fetch it with: git lfs pull")


def is_lfs_pointer(path: Path) -> bool:
    """Whether a regular file is the pointer that Git LFS leaves in place of the content.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return file.read(len(LFS_HEADER)) == LFS_HEADER


def find_lfs_pointers(folder: Path, *patterns: str) -> list[str]:
    """Names of the files in a folder that match one of the glob patterns and are Git LFS pointers."""
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.name for path in files if is_lfs_pointer(path))


def read_text(path: Path) -> str:
    """Read a small UTF-8 file, without byte-order mark and with all line ends as newlines.

    Raises:
        OSError: the file does not exist or cannot be read.
        UnusableFileError: not a regular file, a Git LFS pointer, or not UTF-8; names the line.
    """
    require_file(path)
    return "\n".join([*decode_lines(path.read_bytes()), ""])


def decode_lines(block: bytes, num_lines: int = 0, *, is_first: bool | None = None) -> list[str]:
    """Decode UTF-8 lines that end in LF, CR LF or CR, without line ends and byte-order mark.

    Args:
        block: complete lines of a file.
        num_lines: number of lines of the file before them.
        is_first: whether the block is the beginning of the file; None: if there are no lines before it.

    Raises:
        NotTextError: a byte is not UTF-8; names the line.
    """
    try:
        text = block.decode()
    except UnicodeDecodeError as error:
        line = num_lines + len(decode_lines(block[: error.start] + b"."))
        raise NotTextError(f"line {line}: found byte 0x{block[error.start]:02x}, expected UTF-8") from None
    # Some editors put a byte-order mark at the beginning of a file.
    starts_file = num_lines == 0 if is_first is None else is_first
    text = text.removeprefix(BYTE_ORDER_MARK) if starts_file else text
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.removesuffix("\n").split("\n")


def _expand_variable(match: re.Match[str], text: str) -> str:
    name = match["plain"] if match["braced"] is None else match["braced"]
    if name not in os.environ:
        raise ValueError(f"found {text!r}, but the variable {name or 'of no name'} is not set")
    return os.environ[name]
