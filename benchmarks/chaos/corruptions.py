"""Corruptions of a checkpoint file; each of them alters the folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from random import Random

MANIFEST = "manifest.json"


def truncate(checkpoint: Path, generator: Random) -> str:
    """Cut a file short."""
    path = _any_file(checkpoint, generator)
    size = generator.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"{path.name} cut to {size} bytes"


def delete(checkpoint: Path, generator: Random) -> str:
    """Remove a file."""
    path = _any_file(checkpoint, generator)
    path.unlink()
    return f"{path.name} removed"


def empty(checkpoint: Path, generator: Random) -> str:
    """Leave a file without content."""
    path = _any_file(checkpoint, generator)
    os.truncate(path, 0)
    return f"{path.name} emptied"


def flip_bit(checkpoint: Path, generator: Random) -> str:
    """Alter one bit of a file."""
    path = _any_file(checkpoint, generator)
    content = bytearray(path.read_bytes())
    bit = generator.randrange(path.stat().st_size * 8)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return f"bit {bit} of {path.name} flipped"


def swap(checkpoint: Path, generator: Random) -> str:
    """Exchange two files of different content."""
    first = _any_file(checkpoint, generator)
    content = first.read_bytes()
    second = generator.choice([path for path in _files(checkpoint) if path.read_bytes() != content])
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    return f"{first.name} and {second.name} exchanged"


def edit_manifest(checkpoint: Path, generator: Random) -> str:
    """Change one digit of the manifest, which stays well-formed."""
    path = checkpoint / MANIFEST
    text = path.read_text(encoding="utf-8")
    position = generator.choice([index for index, character in enumerate(text) if character in "123456789"])
    digit = generator.choice([digit for digit in "123456789" if digit != text[position]])
    path.write_text(text[:position] + digit + text[position + 1 :], encoding="utf-8")
    return f"{MANIFEST}: {text[position]} at {position} became {digit}"


def delete_manifest(checkpoint: Path, generator: Random) -> str:
    """Remove the manifest."""
    (checkpoint / MANIFEST).unlink()
    return f"{MANIFEST} removed"


CORRUPTIONS: tuple[Callable[[Path, Random], str], ...] = (
    truncate,
    delete,
    flip_bit,
    empty,
    swap,
    edit_manifest,
    delete_manifest,
)
"""(checkpoint folder, generator) -> description of the corruption."""


def _files(checkpoint: Path) -> list[Path]:
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST]
    return sorted(path for path in files if path.stat().st_size)


def _any_file(checkpoint: Path, generator: Random) -> Path:
    return generator.choice(_files(checkpoint))
