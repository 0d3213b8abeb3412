"""Reading the part of a pre-trained weight that belongs to one rank, and no more of the file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from das_ds.errors import ModelError


class NotInPartsError(Exception):
    """Weights that cannot be read in parts; says why."""


class StoredWeights:
    """The weights of a model in safetensors files, by the names that the model gives them.

    One file is open at a time, since what was read of it counts as memory of this process.

    Args:
        source: folder or hub name.
        model: the model they are for; its parameters need no values.

    Raises:
        NotInPartsError: there are no such files, or tensors from which the model's own have yet to be computed.
        SafetensorError, OSError: damaged files; later reading may raise them too.
    """

    def __init__(self, source: str, model: PreTrainedModel) -> None:
        self._open: tuple[Path, Any] | None = None
        self._places: dict[str, tuple[Path, str]] = {}
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        expected = model.state_dict()
        for path in _files(source):
            for key in self._file(path).keys():  # noqa: SIM118 (no dictionary)
                name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
                if converter is not None:
                    raise NotInPartsError(f"{key} has to be merged with other tensors")
                self._places[name] = (path, key)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str, shape: torch.Size, offset: int, numel: int) -> torch.Tensor:
        """Elements [offset, offset + numel) of a flattened tensor, (numel,) float32 with memory of its own.

        Raises:
            ModelError: the file holds another shape.
        """
        path, key = self._places[name]
        stored = self._file(path).get_slice(key)
        if tuple(stored.get_shape()) != tuple(shape):
            raise ModelError(f"weights of {name}: found shape {tuple(stored.get_shape())}, expected {tuple(shape)}")
        if not shape or not numel:
            return self._file(path).get_tensor(key).float().reshape(-1)[offset : offset + numel].clone()
        row = math.prod(shape[1:])
        first, last = offset // row, -(-(offset + numel) // row)
        start = offset - first * row
        return stored[first:last].reshape(-1)[start : start + numel].to(torch.float32, copy=True)

    def close(self) -> None:
        """Close the file that is open."""
        if self._open is not None:
            self._open[1].__exit__(None, None, None)
            self._open = None

    def _file(self, path: Path) -> Any:
        if self._open is None or self._open[0] != path:
            self.close()
            self._open = (path, safe_open(path, framework="pt").__enter__())
        return self._open[1]


def _files(source: str) -> list[Path]:
    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": False}
    whole = cached_file(source, SAFE_WEIGHTS_NAME, **options)
    if whole is not None:
        return [Path(whole)]
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **options)
    if index is None:
        raise NotInPartsError(f"{source} has no {SAFE_WEIGHTS_NAME}")
    return [Path(file) for file in get_checkpoint_shard_files(source, index)[0]]
