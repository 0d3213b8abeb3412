"""Reading the part of a pre-trained weight that belongs to one rank, and no more of the file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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


class StoredWeights:
    """The weights of a model in open safetensors files, by the names that the model gives them.

    Args:
        files: open files.
        model: the model they are for; its parameters need no values.

    Raises:
        NotInPartsError: the files hold tensors from which the model's own have yet to be computed.
    """

    def __init__(self, files: list[Any], model: PreTrainedModel) -> None:
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        expected = model.state_dict()
        self._places: dict[str, tuple[Any, str]] = {}
        for file in files:
            for key in file.keys():  # noqa: SIM118 (no dictionary)
                name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
                if converter is not None:
                    raise NotInPartsError(f"{key} has to be merged with other tensors")
                self._places[name] = (file, key)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str, shape: torch.Size, offset: int, numel: int) -> torch.Tensor:
        """Elements [offset, offset + numel) of a flattened tensor, (numel,) float32 with memory of its own.

        Raises:
            ModelError: the file holds another shape.
        """
        file, key = self._places[name]
        stored = file.get_slice(key)
        if tuple(stored.get_shape()) != tuple(shape):
            raise ModelError(f"weights of {name}: found shape {tuple(stored.get_shape())}, expected {tuple(shape)}")
        if not shape or not numel:
            return file.get_tensor(key).float().reshape(-1)[offset : offset + numel].clone()
        row = math.prod(shape[1:])
        first, last = offset // row, -(-(offset + numel) // row)
        start = offset - first * row
        return stored[first:last].reshape(-1)[start : start + numel].to(torch.float32, copy=True)


class NotInPartsError(Exception):
    """Weights that cannot be read in parts; says why."""


@contextmanager
def stored_weights(source: str, model: PreTrainedModel) -> Iterator[StoredWeights]:
    """The safetensors files of a folder or hub name, open.

    Raises:
        NotInPartsError: there are none, or their tensors are not those of the model.
        SafetensorError, OSError: damaged files.
    """
    with ExitStack() as stack:
        yield StoredWeights([stack.enter_context(safe_open(f, framework="pt")) for f in _files(source)], model)


def _files(source: str) -> list[Path]:
    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": False}
    whole = cached_file(source, SAFE_WEIGHTS_NAME, **options)
    if whole is not None:
        return [Path(whole)]
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **options)
    if index is None:
        raise NotInPartsError(f"{source} has no {SAFE_WEIGHTS_NAME}")
    return [Path(file) for file in get_checkpoint_shard_files(source, index)[0]]
