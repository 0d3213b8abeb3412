"""From unit importance to the protection of parameters, whole or cut into shards.

A parameter is a matrix of R rows and C columns whose element (r, c) has importance

    I[r, c] = max(rows[r], columns[c])          (a vector that is absent counts as 0)

so a mask is two vectors and never a tensor of the parameter's size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from das_ds.functional.segments import ABSENT, Segment
from das_ds.functional.units import Importance, Ownership, UnitLayout


@dataclass(frozen=True)
class ParameterMask:
    """Where one parameter's row and column importances begin in `MaskTable.values`."""

    num_columns: int
    rows: int = ABSENT
    columns: int = ABSENT


class MaskTable:
    """Masks of all protected parameters over one small vector of importances.

    Every (group, layer, repeat) is one stretch of the vector, expanded to rows or columns; parameters that share
    units share the stretch. Parameters that no unit owns have one importance, 1 - shared_scale.
    """

    def __init__(
        self, layout: UnitLayout, *, readers: bool, shared_scale: float, device: torch.device | str = "cpu"
    ) -> None:
        self._stretches: dict[tuple[str, int, int], slice] = {}
        size = 1
        by_axis: dict[str, dict[int, int]] = {}
        for item in layout.ownerships:
            if item.reader and not readers:
                continue
            key = self._key(item)
            if key not in self._stretches:
                length = layout.num_units[item.group] * item.units_repeat
                self._stretches[key] = slice(size, size + length)
                size += length
            by_axis.setdefault(item.parameter, {})[item.axis] = self._stretches[key].start
        self.values = torch.zeros(size, dtype=torch.float32, device=device)
        self.values[0] = 1.0 - shared_scale
        self.masks: dict[str, ParameterMask] = {}
        for name, (num_rows, num_columns) in layout.shapes.items():
            if name in by_axis:
                axes = by_axis[name]
                self.masks[name] = ParameterMask(num_columns, axes.get(0, ABSENT), axes.get(1, ABSENT))
            elif shared_scale < 1.0:
                # One row of all elements, so that the single shared value serves any shape.
                self.masks[name] = ParameterMask(num_rows * num_columns, rows=0)

    @staticmethod
    def _key(item: Ownership) -> tuple[str, int, int]:
        return item.group, item.layer, item.units_repeat

    def load(self, importance: Importance) -> None:
        """Fill the vector, and with it every segment made from this table, from group -> (L, U)."""
        for (group, layer, repeat), stretch in self._stretches.items():
            self.values[stretch] = importance[group][layer].to(self.values.device).repeat_interleave(repeat)

    def segment(self, name: str, *, start: int, offset: int, numel: int) -> Segment:
        """Elements [offset, offset + numel) of a flattened parameter, lying at `start` of a flat tensor."""
        mask = self.masks.get(name)
        if mask is None:
            return Segment(start, numel)
        return Segment(start, numel, offset, mask.num_columns, mask.rows, mask.columns)
