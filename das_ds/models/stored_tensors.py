"""Files of weights, safetensors or torch's own, whose tensors are read by stretches."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from das_ds.errors import ModelError

SAFE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
READABLE = frozenset(SAFE_DTYPES.values())
"""Types whose numbers are the weights themselves; all others need a scale, or code, to become weights."""
ORDER = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
"""Where weights are looked for, as in transformers: the first that there is counts."""


class TensorFile(Protocol):
    """One file, open."""

    def names(self) -> list[str]:
        """Names of its tensors."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor."""

    def dtype(self, key: str) -> str:
        """Of a tensor, as torch names it where it knows it."""

    def read(self, key: str, offset: int, numel: int) -> torch.Tensor:
        """Elements [offset, offset + numel) of a flattened tensor, (numel,) float32 with memory of its own."""

    def close(self) -> None:
        """Close it."""


class SafetensorsFile(TensorFile):
    """A safetensors file; only the rows that are asked for are read."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, framework="pt").__enter__()

    def names(self) -> list[str]:
        """See `TensorFile`."""
        return list(self._file.keys())

    def shape(self, key: str) -> tuple[int, ...]:
        """See `TensorFile`."""
        return tuple(self._file.get_slice(key).get_shape())

    def dtype(self, key: str) -> str:
        """See `TensorFile`."""
        stored = self._file.get_slice(key).get_dtype()
        return _dtype_name(SAFE_DTYPES[stored]) if stored in SAFE_DTYPES else str(stored)

    def read(self, key: str, offset: int, numel: int) -> torch.Tensor:
        """See `TensorFile`."""
        stored = self._file.get_slice(key)
        shape = stored.get_shape()
        if not shape or not numel:
            return self._file.get_tensor(key).float().reshape(-1)[offset : offset + numel].clone()
        row = math.prod(shape[1:])
        first, last = offset // row, -(-(offset + numel) // row)
        start = offset - first * row
        return stored[first:last].reshape(-1)[start : start + numel].to(torch.float32, copy=True)

    def close(self) -> None:
        """See `TensorFile`."""
        self._file.__exit__(None, None, None)


class TorchFile(TensorFile):
    """A state dict that torch saved; read from the file as needed, but whole where the file is of the old form.

    Raises:
        ModelError: it holds anything but tensors.
    """

    def __init__(self, path: Path) -> None:
        try:
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:
                content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ModelError(f"{path}: found no state dict of tensors alone, expected one") from error
        found = next((f"{key}: {type(v).__name__}" for key, v in content.items() if not torch.is_tensor(v)), None)
        if found is not None:
            raise ModelError(f"{path}: found {found}, expected a state dict, name to tensor")
        self._tensors: dict[str, torch.Tensor] = content

    def names(self) -> list[str]:
        """See `TensorFile`."""
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """See `TensorFile`."""
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> str:
        """See `TensorFile`."""
        return _dtype_name(self._tensors[key].dtype)

    def read(self, key: str, offset: int, numel: int) -> torch.Tensor:
        """See `TensorFile`."""
        return self._tensors[key].reshape(-1)[offset : offset + numel].to(torch.float32, copy=True)

    def close(self) -> None:
        """See `TensorFile`; a mapped file is let go with its tensors."""
        self._tensors = {}


class TensorFiles:
    """All files of a model; one is open at a time, since what was read of it counts as memory of this process.

    Args:
        source: folder or hub name.
        name: the file that the model's config names; None: those of `ORDER`.
        local_only: look for a hub name on this machine alone.

    Raises:
        OSError: there are none, or one is missing.
        ModelError: one holds no state dict, or two hold a tensor of the same name.
    """

    def __init__(self, source: str, *, name: str | None = None, local_only: bool = False) -> None:
        self.paths = _paths(source, ORDER if name is None else (name,), local_only=local_only)
        self.places: dict[str, Path] = {}
        """Name of a tensor -> its file."""
        self._open: tuple[Path, TensorFile] | None = None
        for path in self.paths:
            for key in self.file(path).names():
                if key in self.places:
                    raise ModelError(
                        f"{source}: found {key} in {self.places[key].name} and in {path.name}, expected one of them"
                    )
                self.places[key] = path

    def of(self, key: str) -> TensorFile:
        """The file of a tensor."""
        return self.file(self.places[key])

    def file(self, path: Path) -> TensorFile:
        """A file, opened unless it was opened last."""
        if self._open is None or self._open[0] != path:
            self.close()
            self._open = (path, SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path))
        return self._open[1]

    def close(self) -> None:
        """Close the file that is open."""
        if self._open is not None:
            self._open[1].close()
            self._open = None


def find_file(source: str, name: str, *, local_only: bool = False) -> Path | None:
    """A file of a folder or hub name; None where there is none, or no answer."""
    options = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_gated_repo": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    with suppress(OSError):
        found = cached_file(source, name, local_files_only=local_only, **options)
        return None if found is None else Path(found)
    return None


def _paths(source: str, names: tuple[str, ...], *, local_only: bool) -> list[Path]:
    for name in names:
        found = find_file(source, name, local_only=local_only)
        if found is None:
            continue
        if not name.endswith(".index.json"):
            return [found]
        paths = _shards(source, found, local_only=local_only)
        if missing := [path.name for path in paths if not path.is_file()]:
            raise ModelError(
                f"{found}: found no {abbreviate(missing)}, which it names, expected all files of the weights"
            )
        return paths
    raise OSError(f"found no weights, expected {' or '.join(names)}{_beside(source)}")


def _shards(source: str, index: Path, *, local_only: bool) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: found no weight_map, expected an index of weights") from error
    if Path(source).is_dir():
        return [index.parent / name for name in names]
    return [Path(file) for file in get_checkpoint_shard_files(source, index, local_files_only=local_only)[0]]


def _beside(source: str) -> str:
    """Files of weights that are none of these, such as those of a variant."""
    others = sorted(
        path.name for path in _files_in(source) if re.search(r"\.(safetensors|bin|pt|pth|gguf)$", path.name)
    )
    return f"; found {abbreviate(others)}" if others else ""


def _files_in(source: str) -> Iterator[Path]:
    return Path(source).iterdir() if Path(source).is_dir() else iter(())


def abbreviate(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
