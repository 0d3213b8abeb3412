"""Importance on disk: safetensors with the structure it belongs to in the header."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from das_ds.errors import ImportanceError
from das_ds.functional.units import Importance, UnitLayout

FORMAT_VERSION = "1"


def save_importance(path: Path, importance: Importance, layout: UnitLayout) -> None:
    """Write group -> (L, U) atomically."""
    partial = path.with_suffix(".partial")
    tensors = {group: values.detach().cpu().contiguous() for group, values in importance.items()}
    save_file(tensors, partial, metadata={"format_version": FORMAT_VERSION, "model_type": layout.model_type})
    os.replace(partial, path)


def load_importance(path: Path, layout: UnitLayout) -> Importance:
    """Read importance and check that it belongs to this architecture.

    Raises:
        ImportanceError: missing or damaged file, another format, model type, or number of layers or units.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            importance = {group: file.get_tensor(group) for group in file.keys()}  # noqa: SIM118 (no dictionary)
    except (OSError, SafetensorError) as error:
        raise ImportanceError(f"{path}: cannot read importance: {error}") from error
    if metadata.get("format_version") != FORMAT_VERSION:
        raise ImportanceError(
            f"{path}: importance format {metadata.get('format_version')!r}, this version reads {FORMAT_VERSION!r}"
        )
    found = {group: tuple(values.shape) for group, values in importance.items()}
    expected = {group: (layout.num_layers, units) for group, units in layout.num_units.items()}
    if metadata["model_type"] != layout.model_type or found != expected:
        raise ImportanceError(
            f"{path}: importance of another model: found {metadata['model_type']} with {found}, "
            f"expected {layout.model_type} with {expected} (group: layers, units)"
        )
    return importance
