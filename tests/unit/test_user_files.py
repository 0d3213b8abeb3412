"""Paths and files named by the user: expansion, and every kind of unusable file."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from das_ds.user_files import LFS_HEADER, UnusableFileError, decode_lines, expand_path, read_text, require_file


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("~/runs", "/home/reader/runs"),
        ("~", "/home/reader"),
        ("$SCRATCH/a b/*.txt", "/scratch/a b/*.txt"),
        ("${SCRATCH}_2/x", "/scratch_2/x"),
        ("$UNDER_HOME/x", "/home/reader/under/x"),
        ("roberta-base", "roberta-base"),
        ("owner/name:config@split", "owner/name:config@split"),
        ("a~b/$/c$", "a~b/$/c$"),
        ("$5", "$5"),
    ],
)
def test_expand_path_like_a_shell(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/reader")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.setenv("UNDER_HOME", "~/under")
    assert expand_path(text) == expected
    assert expand_path(expected) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$NOT_SET_HERE/x", "found '$NOT_SET_HERE/x', but the variable NOT_SET_HERE is not set"),
        ("${NOT_SET_HERE}/x", "but the variable NOT_SET_HERE is not set"),
        ("${}", "but the variable of no name is not set"),
        ("$ODD/x", "which gives '$NOT_SET_HERE/x' with a variable again"),
        ("a\0b", "with a NUL character, expected a path"),
        ("~nobody-of-that-name/x", "but ~nobody-of-that-name has no home folder here"),
    ],
)
def test_expand_path_unset_variable_raises(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    monkeypatch.setenv("ODD", "$NOT_SET_HERE")
    with pytest.raises(ValueError) as caught:
        expand_path(text)
    assert expected in str(caught.value)


def test_expand_path_user_without_home_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def unknown(user: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {user}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(ValueError, match="~ has no home folder here"):
        expand_path("~/runs")


def test_require_file_special_files_raise_unopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        found = {"pipe": "a named pipe", "socket": "a socket", "/dev/null": "a device", ".": "a folder"}
        for name, kind in found.items():
            with pytest.raises(UnusableFileError, match=f"^is {kind}, expected a regular file$"):
                require_file(Path(name))


def test_require_file_lfs_pointer_raises(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(LFS_HEADER + b"\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UnusableFileError, match="is a Git LFS pointer, expected the file itself"):
        read_text(path)
    path.write_bytes(b"version https://git-lfs is what this line is about\n")
    assert read_text(path).startswith("version")


def test_decode_lines_all_line_ends_and_byte_order_mark() -> None:
    assert decode_lines(b"\xef\xbb\xbfa\r\nb\rc\n\nd") == ["a", "b", "c", "", "d"]
    assert decode_lines("a\u2028b\x0bc\n".encode()) == ["a\u2028b\x0bc"]
    assert decode_lines("\ufeffa".encode(), num_lines=3) == ["\ufeffa"]
    with pytest.raises(UnusableFileError, match="line 6: found byte 0xe9, expected UTF-8"):
        decode_lines(b"a\r\nb\rc\xe9", num_lines=3)
