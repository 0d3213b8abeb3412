"""Units of a network, and which rows or columns of which parameters they own.

Shape legend: L layers, U units of a group in one layer; a parameter is E blocks (experts; else 1) of R rows and
C columns (a vector of R entries is a matrix with C = 1); A entries of an axis over all blocks, K owners of an entry.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

HEAD = "head"
INTERMEDIATE = "intermediate"
OUTPUT = "output"
GROUPS = (HEAD, INTERMEDIATE, OUTPUT)
UNOWNED = "unowned"
"""In place of a group: parameters that no unit owns (embeddings, normalization, LM head)."""

UnitValues = dict[str, torch.Tensor]
"""Group -> (L, U) float32, one value per unit; importance in [0, 1] unless stated otherwise."""


@dataclass(frozen=True)
class UnitRule:
    """One row of an architecture's table: the units of `group` own (or consume) `parameter` along `axis`."""

    group: str
    parameter: str
    """Parameter name; `{base}` is the base model's prefix and `{layer}` the layer number."""
    axis: int
    """0: units own rows; 1: units own columns."""
    layout: str = "contiguous"
    """How they lie along the axis, a key of `axis_layouts.AXIS_LAYOUTS`."""
    consumer: bool = False
    """The parameter only consumes the units: protected with them only under `softmask.include_consumers`."""
    optional: bool = False
    """Models without this parameter are fine (biases that a config switches on)."""


@dataclass(frozen=True, eq=False)
class Ownership:
    """A rule applied to one parameter of one layer of a real model."""

    parameter: str
    group: str
    layer: int
    axis: int
    units: torch.Tensor
    """(A, K) int64, the units that own each entry of the axis, -1 for none; entry a of block e is row e * A / E + a.
    What several units own is as important as the most important of them. Equal tables are one and the same tensor."""
    consumer: bool


@dataclass(frozen=True, eq=False)
class UnitLayout:
    """The structure of a model: its units, and the shapes and owners of its parameters."""

    model_type: str
    num_layers: int
    num_units: dict[str, int]
    """Group -> U."""
    ownerships: tuple[Ownership, ...]
    shapes: dict[str, tuple[int, int, int]]
    """Every trained parameter -> (E, R, C)."""
    vocabulary: frozenset[str] = frozenset()
    """Parameters with one row per token."""
    adapted: tuple[Ownership, ...] | None = None
    """Where adapters are trained in place of the weights: the ownerships of those weights, of the same units."""

    def sizes_with(self, num_rows: int | None) -> dict[str, int]:
        """`sizes` when the vocabulary has `num_rows` rows; None: all."""
        if num_rows is None:
            return self.sizes
        return {**self.sizes, **{name: num_rows * self.shapes[name][2] for name in self.vocabulary}}

    def without(self, frozen: Collection[str]) -> UnitLayout:
        """The layout without these parameters, which are not trained."""
        return replace(
            self,
            ownerships=tuple(item for item in self.ownerships if item.parameter not in frozen),
            shapes={name: shape for name, shape in self.shapes.items() if name not in frozen},
            vocabulary=self.vocabulary.difference(frozen),
        )

    @property
    def owners(self) -> dict[str, str]:
        """Every trained parameter -> the group whose units own it, or `UNOWNED`."""
        owned = {item.parameter: item.group for item in self.ownerships if not item.consumer}
        return {name: owned.get(name, UNOWNED) for name in self.shapes}

    @property
    def sizes(self) -> dict[str, int]:
        """Every trained parameter -> number of its weights."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    def zeros(self, device: torch.device | str = "cpu") -> UnitValues:
        """Importance 0 for every unit: nothing is protected yet."""
        return {
            group: torch.zeros(self.num_layers, units, dtype=torch.float32, device=device)
            for group, units in self.num_units.items()
        }


def block_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, int, int]:
    """(E, R, C) of a parameter: a vector has one column, and dimensions before the last two are blocks."""
    sizes = [int(size) for size in shape]
    if len(sizes) < 2:
        return 1, math.prod(sizes), 1
    return math.prod(sizes[:-2]), sizes[-2], sizes[-1]
