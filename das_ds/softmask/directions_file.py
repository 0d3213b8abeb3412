"""Directions file: the moments of a network's inputs in one safetensors file, which their owners write together.

Every rank writes its moments where the header puts them, so that no rank has all, and reads only what it owns.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from das_ds.distributed.process_group import ProcessGroup
from das_ds.errors import DasError, ImportanceError
from das_ds.functional.directions import describe_invalid_moment
from das_ds.functional.units import UnitLayout
from das_ds.softmask.importance_file import (
    DIRECTION,
    NUM_TOKENS,
    STRUCTURE,
    TOKENS,
    Shapes,
    check_granularity,
    check_model,
    check_origin,
    structure_digest,
    token_digest,
    writing,
)
from das_ds.softmask.input_layout import InputLayout, moment_bytes
from das_ds.storage import CHECKSUM, sync
from das_ds.user_files import require_file

FORMAT_VERSION = "5"
"""Moments by input. Version 4 had them by weight, in the format of importance files."""
ALIGNMENT = 4096
"""Of the first moment: ranks on different hosts then write different pages wherever d is a multiple of 32."""
CHUNK_BYTES = 1 << 24
"""Bytes of a moment that are hashed or written at a time."""


def save_directions(
    path: Path,
    moments: Mapping[str, torch.Tensor],
    inputs: InputLayout,
    layout: UnitLayout,
    ranks: ProcessGroup,
    tokens: Sequence[str] = (),
) -> None:
    """Write input -> (d, d) float32 atomically; a collective, after which every rank sees the file.

    Nothing is copied: each rank hashes and writes its moments in chunks.

    Args:
        path: of the file, in a folder that all ranks share.
        moments: those that this rank owns, in host memory.
        inputs: layout of the inputs; the union of all ranks' moments.
        layout: of the network.
        ranks: the process group.
        tokens: the vocabulary that the moments were measured with, by id.

    Raises:
        RunFolderError: on every rank, when any cannot write; an older file of this path is unchanged.
    """
    digests: dict[str, str] = {}
    for part in ranks.all_gather_object({name: moment_digest(moment) for name, moment in moments.items()}):
        digests |= part
    header = _build_header(inputs.widths, digests, layout, tokens)
    partial = path.with_name(path.name + ".partial")
    try:
        ranks.run_on_main(lambda: _create(path, partial, header))
        ranks.raise_on_all_ranks(_write_moments(path, partial, len(header), moments, inputs.widths))
        ranks.run_on_main(lambda: _publish(path, partial))
    except DasError:
        if ranks.info.is_main:
            # What cannot be written may not be removable either; the error is the first one.
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        raise


def load_directions(
    path: Path, names: Iterable[str], widths: Mapping[str, int], layout: UnitLayout, tokens: Sequence[str] | None = None
) -> tuple[dict[str, torch.Tensor], int]:
    """Read the moments of some inputs, and check that the file belongs to this network.

    Args:
        path: of the file.
        names: the inputs to read; the bytes of the others are not.
        widths: every input -> d.
        layout: of the network.
        tokens: the run's vocabulary, by id; it may have gained tokens at its end since. None: it is not compared.

    Returns:
        Input -> (d, d) float32 in host memory, and the number of tokens that there were when they were measured.

    Raises:
        ImportanceError: missing or damaged file, another format, model type, table of units or vocabulary, or other
            inputs; a matrix that is no second moment.
    """
    expected: Shapes = {name: (width, width) for name, width in widths.items()}
    moments = {}
    with _open_directions(path) as (file, header):
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dictionary)
        check_model(path, header, found, layout, DIRECTION, expected)
        check_origin(path, header, layout, tokens)
        digests = json.loads(header.get(CHECKSUM, "{}"))
        for name in names:
            # A copy: the file may be replaced while the run needs the moment.
            moments[name] = file.get_tensor(name).clone()
            _check_moment(path, name, moments[name], digests.get(name))
    return moments, int(header[NUM_TOKENS])


def check_directions_file(path: Path) -> None:
    """Check that a file is of this format, without the network that it belongs to; no moment is read.

    Raises:
        ImportanceError: missing or damaged file, another format or granularity.
    """
    with _open_directions(path) as (_, header):
        check_granularity(path, header["granularity"], DIRECTION)


@contextmanager
def _open_directions(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """The open file and its header, once the format is right."""
    try:
        require_file(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            _check_format(path, header)
            yield file, header
    except (OSError, SafetensorError, ValueError) as error:
        raise ImportanceError(f"{path}: cannot read directions: {error}") from error


def moment_digest(moment: torch.Tensor) -> str:
    """SHA-256 of a matrix, a chunk at a time."""
    digest = hashlib.sha256()
    for chunk in _chunks(moment):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(moment: torch.Tensor) -> Iterable[memoryview]:
    assert moment.dtype == torch.float32 and moment.is_contiguous(), "moments are float32 matrices"
    for chunk in moment.detach().view(-1).view(torch.uint8).split(CHUNK_BYTES):
        yield chunk.numpy().data


def _build_header(
    widths: Mapping[str, int], digests: Mapping[str, str], layout: UnitLayout, tokens: Sequence[str]
) -> bytes:
    """The header of a safetensors file: its length in 8 bytes, and names, shapes and places of the moments as JSON."""
    metadata = {
        "format_version": FORMAT_VERSION,
        "granularity": DIRECTION,
        "model_type": layout.model_type,
        STRUCTURE: structure_digest(layout),
        NUM_TOKENS: str(len(tokens)),
        TOKENS: token_digest(tokens),
        CHECKSUM: json.dumps({name: digests[name] for name in widths}),
    }
    entries: dict[str, object] = {"__metadata__": metadata}
    for name, offset in _offsets(widths).items():
        width = widths[name]
        entries[name] = {
            "dtype": "F32",
            "shape": [width, width],
            "data_offsets": [offset, offset + moment_bytes(width)],
        }
    text = json.dumps(entries).encode()
    # The format allows spaces at the end.
    padded = text + b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(padded).to_bytes(8, "little") + padded


def _offsets(widths: Mapping[str, int]) -> dict[str, int]:
    """Input -> first byte of its moment behind the header."""
    offsets = {}
    position = 0
    for name, width in widths.items():
        offsets[name] = position
        position += moment_bytes(width)
    return offsets


def _create(path: Path, partial: Path, header: bytes) -> None:
    with writing(path):
        partial.unlink(missing_ok=True)
        with partial.open("wb") as file:
            file.write(header)
        sync(partial.parent)


def _write_moments(
    path: Path, partial: Path, start: int, moments: Mapping[str, torch.Tensor], widths: Mapping[str, int]
) -> DasError | None:
    """Write this rank's moments at their places; the error, if there is one."""
    offsets = _offsets(widths)
    try:
        with writing(path), partial.open("r+b") as file:
            for name, moment in moments.items():
                file.seek(start + offsets[name])
                for chunk in _chunks(moment):
                    file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    except DasError as error:
        return error
    return None


def _publish(path: Path, partial: Path) -> None:
    with writing(path):
        os.replace(partial, path)
        sync(path.parent)


def _check_format(path: Path, header: Mapping[str, str]) -> None:
    version = header.get("format_version")
    # A newer importance file tells of its granularity.
    if version != FORMAT_VERSION and header.get("granularity", DIRECTION) == DIRECTION:
        raise ImportanceError(
            f"{path}: directions format {version!r}, this version reads {FORMAT_VERSION!r}; measure them again"
        )


def _check_moment(path: Path, name: str, moment: torch.Tensor, digest: str | None) -> None:
    if moment_digest(moment) != digest:
        raise ImportanceError(f"{path}: was altered: the checksum of {name} differs")
    if fault := describe_invalid_moment(moment):
        raise ImportanceError(f"{path}: {name}: found {fault}, expected a second moment (symmetric, not negative)")
