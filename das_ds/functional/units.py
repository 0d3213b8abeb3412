"""Units of a network and which stretch of which parameter they own.

Shape legend: L layers, U units of a group in one layer, R rows and C columns of a parameter seen as a matrix
(a vector of R entries is a matrix with C = 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

HEAD, INTERMEDIATE, OUTPUT = "head", "intermediate", "output"
GROUPS = (HEAD, INTERMEDIATE, OUTPUT)

Importance = dict[str, torch.Tensor]
"""Group -> (L, U) float32 in [0, 1]."""


@dataclass(frozen=True)
class UnitRule:
    """One row of an architecture's table: the units of `group` own (or read) `parameter` along `axis`."""

    group: str
    parameter: str
    """Parameter name; `{base}` stands for the base model's prefix and `{layer}` for the layer number."""
    axis: int
    """0: unit u owns rows; 1: unit u owns columns."""
    reader: bool = False
    """The parameter only reads the unit: protected with it under `softmask.readers` alone."""


@dataclass(frozen=True)
class Ownership:
    """A rule applied to one parameter of one layer of a real model."""

    parameter: str
    group: str
    layer: int
    axis: int
    units_repeat: int
    """Rows or columns per unit: unit u owns indices [u * units_repeat, (u + 1) * units_repeat)."""
    reader: bool


@dataclass(frozen=True)
class UnitLayout:
    """Everything the method needs to know of a model's structure."""

    model_type: str
    num_layers: int
    num_units: dict[str, int]
    """Group -> U."""
    ownerships: tuple[Ownership, ...]
    shapes: dict[str, tuple[int, int]]
    """Every trained parameter -> (R, C)."""

    def zeros(self, device: torch.device | str = "cpu") -> Importance:
        """Importance 0 for every unit: nothing is protected yet."""
        return {
            group: torch.zeros(self.num_layers, units, dtype=torch.float32, device=device)
            for group, units in self.num_units.items()
        }


def matrix_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """(R, C) of a parameter: a vector has one column, further dimensions count as columns."""
    rows = int(shape[0]) if len(shape) else 1
    columns = 1
    for size in shape[1:]:
        columns *= int(size)
    return rows, columns
