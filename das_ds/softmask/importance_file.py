"""Importance files: safetensors with a description of the network that they belong to in the header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional

from das_ds.errors import ImportanceError, RunFolderError
from das_ds.functional.units import UnitLayout, UnitValues
from das_ds.storage import CHECKSUM, atomic_write, link_file
from das_ds.user_files import require_file

FORMAT_VERSION = "4"
UNIT = "unit"
PARAMETER = "parameter"
DIRECTION = "direction"

# Keys of the header.
STRUCTURE = "structure"
"""Checksum of the table of units."""
NUM_TOKENS = "num_tokens"
"""Tokens of the vocabulary."""
TOKENS = "tokens"
"""Checksum of the tokens."""
CHUNK_BYTES = 1 << 24
"""Bytes of a tensor that are hashed at a time."""

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class StoredImportance:
    """An importance file of any model, open for reading."""

    granularity: str
    """`UNIT` or `PARAMETER`."""
    model_type: str
    shapes: Shapes
    """Unit group -> (L, U), or parameter name -> (N,)."""
    _file: Any

    def values(self, name: str) -> torch.Tensor:
        """Importance as it is stored: float32 in [0, 1], or uint8 (255ths)."""
        values: torch.Tensor = self._file.get_tensor(name)
        return values


def save_unit_importance(path: Path, importance: UnitValues, layout: UnitLayout, tokens: Sequence[str] = ()) -> None:
    """Write group -> (L, U) atomically.

    Args:
        path: of the file.
        importance: group -> (L, U).
        layout: of the network.
        tokens: the vocabulary that importance was measured with, by id.
    """
    tensors = {group: values.detach().cpu().contiguous() for group, values in importance.items()}
    _save(path, tensors, layout, UNIT, tokens)


def load_unit_importance(path: Path, layout: UnitLayout, tokens: Sequence[str] | None = None) -> UnitValues:
    """Read importance by unit and check that it belongs to this architecture and vocabulary.

    Args:
        path: of the file.
        layout: of the network.
        tokens: the run's vocabulary, by id; it may have gained tokens at its end since. None: it is not compared.

    Raises:
        ImportanceError: missing or damaged file, another format, granularity, model type, number of layers or units,
            table of units, or vocabulary.
    """
    expected: Shapes = {group: (layout.num_layers, units) for group, units in layout.num_units.items()}
    with _open_for_run(path, layout, UNIT, expected, tokens) as (file, _):
        return {group: file.get_tensor(group) for group in expected}


def read_unit_importance(path: Path) -> UnitValues | None:
    """Importance by unit of any model, unit group -> (L, U); None without such a file.

    Raises:
        ImportanceError: the file is damaged.
    """
    if not path.exists():
        return None
    with stored_importance(path) as stored:
        return {group: stored.values(group) for group in stored.shapes} if stored.granularity == UNIT else None


def save_parameter_importance(
    path: Path, importance: dict[str, torch.Tensor], layout: UnitLayout, tokens: Sequence[str] = ()
) -> None:
    """Write parameter name -> (N,) uint8 (255ths) atomically; `tokens` as in `save_unit_importance`."""
    _save(path, importance, layout, PARAMETER, tokens)


@contextmanager
def load_parameter_importance(
    path: Path, layout: UnitLayout, tokens: Sequence[str] | None = None
) -> Iterator[Callable[[str, int, int], torch.Tensor]]:
    """Give a function (name, offset, numel) -> (numel,) uint8, which reads only these elements of the file.

    A file of the same model with fewer tokens is read too: rows of tokens that were added since have importance 0.

    Raises:
        ImportanceError: missing or damaged file, another format, granularity, model type, table of units or vocabulary,
            or other parameters.
    """
    expected: Shapes = {name: (size,) for name, size in layout.sizes.items()}
    with _open_for_run(path, layout, PARAMETER, expected, tokens) as (file, _):

        def read(name: str, offset: int, numel: int) -> torch.Tensor:
            values = file.get_slice(name)[offset : offset + numel]
            return functional.pad(values, (0, numel - len(values)))

        yield read


@contextmanager
def stored_importance(path: Path) -> Iterator[StoredImportance]:
    """Open a file without the model that it belongs to, for reports.

    Raises:
        ImportanceError: missing or damaged file, or another format.
    """
    with _open_checked(path) as (file, header, shapes):
        yield StoredImportance(header["granularity"], header["model_type"], shapes, file)


def link_importance(source: Path, path: Path) -> None:
    """Give a file that was just written a second path, atomically.

    Raises:
        RunFolderError: the disk is full, or the folder cannot be written.
    """
    with writing(path):
        link_file(source, path)


def _save(
    path: Path, tensors: dict[str, torch.Tensor], layout: UnitLayout, granularity: str, tokens: Sequence[str]
) -> None:
    header = {
        "format_version": FORMAT_VERSION,
        "granularity": granularity,
        "model_type": layout.model_type,
        STRUCTURE: structure_digest(layout),
        NUM_TOKENS: str(len(tokens)),
        TOKENS: token_digest(tokens),
        CHECKSUM: _digest(tensors, tensors.__getitem__),
    }
    with writing(path), atomic_write(path) as partial:
        save_file(tensors, partial, metadata=header)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, the file of this path is written; its folder exists.

    Raises:
        RunFolderError: the disk is full, or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        raise RunFolderError(f"{path}: cannot be written ({error}); the run folder must have free space") from error


@contextmanager
def _open_for_run(
    path: Path, layout: UnitLayout, granularity: str, expected: Shapes, tokens: Sequence[str] | None
) -> Iterator[tuple[Any, dict[str, str]]]:
    with _open_checked(path) as (file, header, found):
        check_model(path, header, found, layout, granularity, expected)
        check_origin(path, header, layout, tokens)
        yield file, header


@contextmanager
def _open_checked(path: Path) -> Iterator[tuple[Any, dict[str, str], Shapes]]:
    """The open file, its header and its shapes, once format and checksum are right."""
    try:
        require_file(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("granularity") == DIRECTION:
                raise ImportanceError(
                    f"{path}: importance by {DIRECTION}, from a run of directions, expected by {UNIT} or {PARAMETER}"
                )
            if header.get("format_version") != FORMAT_VERSION:
                raise ImportanceError(
                    f"{path}: importance format {header.get('format_version')!r}, this version reads {FORMAT_VERSION!r}"
                )
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dictionary)
            if _digest(found, file.get_tensor) != header.get(CHECKSUM):
                raise ImportanceError(f"{path}: was altered: the checksum of its tensors differs")
            yield file, header, found
    except (OSError, SafetensorError) as error:
        raise ImportanceError(f"{path}: cannot read importance: {error}") from error


def check_granularity(path: Path, found: str, expected: str) -> None:
    """Check that a file is of this granularity.

    Raises:
        ImportanceError: it is not.
    """
    if found != expected:
        key = "method.init_from" if expected == DIRECTION else "method.importance.granularity"
        raise ImportanceError(f"{path}: importance by {found}, expected by {expected} ({key})")


def check_model(
    path: Path,
    header: dict[str, str],
    found: Shapes,
    layout: UnitLayout,
    granularity: str,
    expected: Shapes,
) -> None:
    """Check that a file is of this granularity, architecture and size.

    Args:
        path: of the file, for messages.
        header: of the file.
        found: its tensors.
        layout: of the run's network.
        granularity: that the run needs.
        expected: the tensors that the run needs.

    Raises:
        ImportanceError: it is not.
    """
    check_granularity(path, header["granularity"], granularity)
    shorter = {name for name in layout.vocabulary & set(found) if _is_shorter(found[name], layout.shapes[name])}
    # Rows of tokens that were added since the file was written may be missing.
    completed = {**found, **{name: expected[name] for name in shorter}}
    if header["model_type"] != layout.model_type or completed != expected:
        raise ImportanceError(
            f"{path}: importance of another model: found {header['model_type']} with "
            f"{_describe_difference(found, expected)}, expected {layout.model_type} with "
            f"{_describe_difference(expected, found)} (name: shape)"
        )


def check_origin(path: Path, header: dict[str, str], layout: UnitLayout, tokens: Sequence[str] | None) -> None:
    """Check the table of units and the vocabulary, which equal shapes say nothing of.

    Args:
        path: of the file, for messages.
        header: of the file.
        layout: of the run's network.
        tokens: see `load_unit_importance`.

    Raises:
        ImportanceError: another table numbers units differently, or rows are of other tokens.
    """
    if header[STRUCTURE] != structure_digest(layout):
        raise ImportanceError(
            f"{path}: importance of another table of units: found layers or units of {header['model_type']} that own "
            "other weights, expected those of this run (model.architecture)"
        )
    if tokens is None:
        return
    num_tokens = int(header[NUM_TOKENS])
    if header[TOKENS] != token_digest(tokens[:num_tokens]) or num_tokens > len(tokens):
        raise ImportanceError(
            f"{path}: importance of another tokenizer: found {num_tokens} tokens, expected the first of this run's "
            f"{len(tokens)} in the same order (data.tokenizer, data.add_tokens)"
        )


def structure_digest(layout: UnitLayout) -> str:
    """Checksum of which unit of which layer owns or consumes which weights; sizes are in the shapes.

    With LoRA the weights are those of the network without adapters, so that importance of its units fits both.
    """
    digest = hashlib.sha256()
    ownerships = layout.ownerships if layout.adapted is None else layout.adapted
    digest_by_table: dict[int, str] = {}
    for item in sorted(ownerships, key=lambda item: (item.parameter, item.group, item.axis, item.consumer)):
        if id(item.units) not in digest_by_table:
            digest_by_table[id(item.units)] = hashlib.sha256(item.units.cpu().numpy().tobytes()).hexdigest()
        ownership = (
            item.parameter,
            item.group,
            item.layer,
            item.axis,
            item.consumer,
            digest_by_table[id(item.units)],
        )
        digest.update(json.dumps(ownership).encode())
    return digest.hexdigest()


def token_digest(tokens: Sequence[str]) -> str:
    """Checksum of a vocabulary in the order of its ids."""
    return hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest()


def _digest(names: Iterable[str], read: Callable[[str], torch.Tensor]) -> str:
    """Checksum of names and tensors; one tensor exists at a time, and none is copied completely."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode())
        for chunk in read(name).flatten().view(torch.uint8).split(CHUNK_BYTES):
            digest.update(chunk.numpy())
    return digest.hexdigest()


def _is_shorter(found: tuple[int, ...], shape: tuple[int, int, int]) -> bool:
    """Whether a flat tensor contains the first rows of a parameter with one row per token, but not all of them."""
    _, num_rows, num_columns = shape
    return len(found) == 1 and found[0] % num_columns == 0 and found[0] < num_rows * num_columns


def _describe_difference(shapes: Shapes, reference: Shapes) -> str:
    """The entries that the reference lacks or has in another shape, at most three."""
    names = [name for name in shapes if reference.get(name) != shapes[name]]
    shown = ", ".join(f"{name}: {shapes[name]}" for name in names[:3])
    return f"{shown or 'the same shapes'}{' ...' if len(names) > 3 else ''}"
