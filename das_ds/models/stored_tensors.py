"""Weight files (safetensors or torch's own format), of which any range of a tensor can be read."""

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
"""Dtypes whose values are the weights themselves; all others need a scale, or code, to become weights."""
ORDER = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
"""File names of weights in order of precedence, as in transformers."""


class TensorFile(Protocol):
    """One open file."""

    def names(self) -> list[str]:
        """Names of the tensors in the file."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    def dtype(self, key: str) -> str:
        """Dtype of a tensor; torch's name for it if torch has the dtype."""

    def read(self, key: str, offset: int, numel: int) -> torch.Tensor:
        """Elements [offset, offset + numel) of a flattened tensor: a copy, (numel,) float32."""

    def close(self) -> None:
        """Close the file."""


class SafetensorsFile(TensorFile):
    """A safetensors file; only the requested rows are read."""

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
            # Scalars and empty ranges have no rows to slice.
            return self._file.get_tensor(key).float().reshape(-1)[offset : offset + numel].clone()
        row_numel = math.prod(shape[1:])
        first = offset // row_numel
        stop = -(-(offset + numel) // row_numel)  # rounded up
        start = offset - first * row_numel
        return stored[first:stop].reshape(-1)[start : start + numel].to(torch.float32, copy=True)

    def close(self) -> None:
        """See `TensorFile`."""
        self._file.__exit__(None, None, None)


class TorchFile(TensorFile):
    """A state dict saved by torch; memory-mapped, or loaded completely if the file has torch's old format.

    Raises:
        ModelError: it contains anything but tensors.
    """

    def __init__(self, path: Path) -> None:
        try:
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:
                content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ModelError(f"{path}: found no state dict of tensors alone, expected one") from error
        others = (f"{key}: {type(value).__name__}" for key, value in content.items() if not torch.is_tensor(value))
        if (found := next(others, None)) is not None:
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
        """See `TensorFile`; a mapped file is closed when its tensors are freed."""
        self._tensors = {}


class TensorFiles:
    """All weight files of a model; only one is open at a time, because mapped pages count as memory of this process.

    Args:
        source: folder or hub name.
        name: the file that the model's config names; None: those of `ORDER`.
        local_only: look up a hub name in the local cache only.

    Raises:
        OSError: no weight file found, or one is missing.
        ModelError: a file contains no state dict, or two files contain a tensor of the same name.
    """

    def __init__(self, source: str, *, name: str | None = None, local_only: bool = False) -> None:
        self.paths = _find_paths(source, ORDER if name is None else (name,), local_only=local_only)
        self.path_by_tensor: dict[str, Path] = {}
        """Name of a tensor -> its file."""
        self._open: tuple[Path, TensorFile] | None = None
        for path in self.paths:
            for key in self.open(path).names():
                if key in self.path_by_tensor:
                    first = self.path_by_tensor[key]
                    raise ModelError(f"{source}: found {key} in {first.name} and in {path.name}, expected one of them")
                self.path_by_tensor[key] = path

    def file_with(self, key: str) -> TensorFile:
        """The open file that contains a tensor."""
        return self.open(self.path_by_tensor[key])

    def open(self, path: Path) -> TensorFile:
        """Open a file and close the previous one, unless it is the same."""
        if self._open is None or self._open[0] != path:
            self.close()
            self._open = (path, SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path))
        return self._open[1]

    def close(self) -> None:
        """Close the open file, if any."""
        if self._open is not None:
            self._open[1].close()
            self._open = None


def find_file(source: str, name: str, *, local_only: bool = False) -> Path | None:
    """A file of a folder or hub name; None if it does not exist or the hub does not answer."""
    options = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_gated_repo": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    with suppress(OSError):
        path = cached_file(source, name, local_files_only=local_only, **options)
        return None if path is None else Path(path)
    return None


def _find_paths(source: str, names: tuple[str, ...], *, local_only: bool) -> list[Path]:
    for name in names:
        file = find_file(source, name, local_only=local_only)
        if file is None:
            continue
        if not name.endswith(".index.json"):
            return [file]
        paths = _list_shards(source, file, local_only=local_only)
        if missing := [path.name for path in paths if not path.is_file()]:
            raise ModelError(
                f"{file}: found no {abbreviate(missing)}, which it names, expected all files of the weights"
            )
        return paths
    raise OSError(f"found no weights, expected {' or '.join(names)}{_mention_other_files(source)}")


def _list_shards(source: str, index: Path, *, local_only: bool) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: found no weight_map, expected an index of weights") from error
    if Path(source).is_dir():
        return [index.parent / name for name in names]
    return [Path(file) for file in get_checkpoint_shard_files(source, index, local_files_only=local_only)[0]]


def _mention_other_files(source: str) -> str:
    """Weight files of other names or formats, such as those of a variant, for an error message."""
    others = sorted(
        path.name for path in _list_files(source) if re.search(r"\.(safetensors|bin|pt|pth|gguf)$", path.name)
    )
    return f"; found {abbreviate(others)}" if others else ""


def _list_files(source: str) -> Iterator[Path]:
    return Path(source).iterdir() if Path(source).is_dir() else iter(())


def abbreviate(names: Sequence[str], limit: int = 3) -> str:
    """The first few names, and the number of the others."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
