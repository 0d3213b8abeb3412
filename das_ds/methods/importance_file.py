"""Importance on disk: safetensors with the structure it belongs to in the header."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional

from das_ds.durable import CHECKSUM, replaced_file
from das_ds.errors import ImportanceError, RunFolderError
from das_ds.functional.directions import moment_fault
from das_ds.functional.units import Importance, UnitLayout
from das_ds.user_files import require_file

FORMAT_VERSION = "3"
IMPORTANCE_FILE = "importance.safetensors"
"""Of a domain in its folder, accumulated in the run folder."""
GENERAL_IMPORTANCE_FILE = "importance_general.safetensors"
DIRECTIONS_FILE = "directions.safetensors"
"""The same of directions."""
UNIT, PARAMETER, DIRECTION = "unit", "parameter", "direction"

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class StoredImportance:
    """A file of importance, open for reading, of whatever model."""

    granularity: str
    """`UNIT` or `PARAMETER`."""
    model_type: str
    shapes: Shapes
    """Unit group -> (L, U), or parameter name -> (N,)."""
    _file: Any

    def values(self, name: str) -> torch.Tensor:
        """Importance as it is stored: float32 in [0, 1], or uint8 (255ths)."""
        found: torch.Tensor = self._file.get_tensor(name)
        return found


def save_unit_importance(path: Path, importance: Importance, layout: UnitLayout) -> None:
    """Write group -> (L, U) atomically."""
    tensors = {group: values.detach().cpu().contiguous() for group, values in importance.items()}
    _save(path, tensors, layout, UNIT)


def load_unit_importance(path: Path, layout: UnitLayout) -> Importance:
    """Read importance by unit and check that it belongs to this architecture.

    Raises:
        ImportanceError: missing or damaged file, another format, granularity, model type, or number of layers or units.
    """
    expected: Shapes = {group: (layout.num_layers, units) for group, units in layout.num_units.items()}
    with _opened(path, layout, UNIT, expected) as file:
        return {group: file.get_tensor(group) for group in expected}


def save_parameter_importance(path: Path, importance: dict[str, torch.Tensor], layout: UnitLayout) -> None:
    """Write parameter name -> (N,) uint8 (255ths) atomically."""
    _save(path, importance, layout, PARAMETER)


@contextmanager
def load_parameter_importance(path: Path, layout: UnitLayout) -> Iterator[Callable[[str, int, int], torch.Tensor]]:
    """Give (name, offset, numel) -> (numel,) uint8, which reads no more of the file than that.

    A file of the same model with fewer tokens is read too: rows of tokens that came later have importance 0.

    Raises:
        ImportanceError: missing or damaged file, another format, granularity, model type, or other parameters.
    """
    expected: Shapes = {name: (size,) for name, size in layout.sizes.items()}
    with _opened(path, layout, PARAMETER, expected) as file:

        def read(name: str, offset: int, numel: int) -> torch.Tensor:
            values = file.get_slice(name)[offset : offset + numel]
            return functional.pad(values, (0, numel - len(values)))

        yield read


def save_directions(path: Path, moments: dict[str, torch.Tensor], layout: UnitLayout) -> None:
    """Write weight name -> (d, d) float32 atomically."""
    tensors = {name: moment.detach().cpu().contiguous() for name, moment in moments.items()}
    _save(path, tensors, layout, DIRECTION)


def load_directions(path: Path, widths: dict[str, int], layout: UnitLayout) -> dict[str, torch.Tensor]:
    """Read weight name -> (d, d) and check that they belong to this network.

    Args:
        path: of the file.
        widths: weight name -> d.
        layout: of the network.

    Raises:
        ImportanceError: missing or damaged file, another format, granularity, model type, or other layers; a matrix
            that is no second moment.
    """
    expected: Shapes = {name: (width, width) for name, width in widths.items()}
    with _opened(path, layout, DIRECTION, expected) as file:
        moments: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in expected}
    for name, moment in moments.items():
        if fault := moment_fault(moment):
            raise ImportanceError(f"{path}: {name}: found {fault}, expected a second moment (symmetric, not negative)")
    return moments


@contextmanager
def stored_importance(path: Path) -> Iterator[StoredImportance]:
    """Importance without the model it belongs to, for those who only look at it.

    Raises:
        ImportanceError: missing or damaged file, or another format.
    """
    with _checked(path) as (file, header, shapes):
        yield StoredImportance(header["granularity"], header["model_type"], shapes, file)


def _save(path: Path, tensors: dict[str, torch.Tensor], layout: UnitLayout, granularity: str) -> None:
    header = {
        "format_version": FORMAT_VERSION,
        "granularity": granularity,
        "model_type": layout.model_type,
        CHECKSUM: _digest(tensors),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as partial:
            save_file(tensors, partial, metadata=header)
    except (OSError, SafetensorError) as error:
        raise RunFolderError(f"{path}: cannot be written ({error}); the run folder must have free space") from error


@contextmanager
def _opened(path: Path, layout: UnitLayout, granularity: str, expected: Shapes) -> Iterator[Any]:
    with _checked(path) as (file, header, found):
        _check(path, header, found, layout, granularity, expected)
        yield file


@contextmanager
def _checked(path: Path) -> Iterator[tuple[Any, dict[str, str], Shapes]]:
    """The open file, its header and its shapes, once format and checksum are right."""
    try:
        require_file(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format_version") != FORMAT_VERSION:
                raise ImportanceError(
                    f"{path}: importance format {header.get('format_version')!r}, this version reads {FORMAT_VERSION!r}"
                )
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dictionary)
            if _digest({name: file.get_tensor(name) for name in found}) != header.get(CHECKSUM):
                raise ImportanceError(f"{path}: was altered: the checksum of its tensors differs")
            yield file, header, found
    except (OSError, SafetensorError) as error:
        raise ImportanceError(f"{path}: cannot read importance: {error}") from error


def _check(
    path: Path,
    header: dict[str, str],
    found: Shapes,
    layout: UnitLayout,
    granularity: str,
    expected: Shapes,
) -> None:
    if header["granularity"] != granularity:
        raise ImportanceError(
            f"{path}: importance by {header['granularity']}, expected by {granularity} (method.importance.granularity)"
        )
    of_fewer_tokens = {name for name in layout.vocabulary & set(found) if _is_shorter(found[name], layout.shapes[name])}
    if header["model_type"] != layout.model_type or {**found, **{n: expected[n] for n in of_fewer_tokens}} != expected:
        raise ImportanceError(
            f"{path}: importance of another model: found {header['model_type']} with {_differing(found, expected)}, "
            f"expected {layout.model_type} with {_differing(expected, found)} (name: shape)"
        )


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _is_shorter(found: tuple[int, ...], shape: tuple[int, int, int]) -> bool:
    """Whether a flat tensor is whole rows of a parameter with one row per token, and not all of them."""
    _, num_rows, num_columns = shape
    return len(found) == 1 and found[0] % num_columns == 0 and found[0] < num_rows * num_columns


def _differing(these: Shapes, others: Shapes) -> str:
    """The entries that the other side lacks or has in another shape, at most three."""
    names = [name for name in these if others.get(name) != these[name]]
    shown = ", ".join(f"{name}: {these[name]}" for name in names[:3])
    return f"{shown or 'the same shapes'}{' ...' if len(names) > 3 else ''}"
