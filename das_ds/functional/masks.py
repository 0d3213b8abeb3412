"""Mask tables: unit importance of flat tensors as short tables of segments, complete or cut into shards.

A parameter is E blocks of R rows and C columns, whose element (e, r, c) has importance

    I[e, r, c] = max(rows[e * R + r], columns[e * C + c])          (an absent vector counts as 0)

so a mask is two vectors and never a tensor of the parameter's size.

Shape legend: F elements of a flat tensor, V values, A entries of an axis, K owners of an entry, L layers, U units.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch

from das_ds.functional.units import UNOWNED, Ownership, UnitLayout, UnitValues

ABSENT = -1


@dataclass(frozen=True)
class Segment:
    """Elements [start, start + numel) of a flat tensor: elements [offset, offset + numel) of a flattened matrix.

    Element i of the segment has importance max(values[rows + (offset + i) // C], values[columns + (offset + i) % C]);
    an absent vector counts as 0. A ZeRO partition begins and ends anywhere, also inside a row.
    """

    start: int
    numel: int
    offset: int = 0
    num_columns: int = 1
    rows: int = ABSENT
    """Where the matrix's row importances begin in the values."""
    columns: int = ABSENT
    """Where the matrix's column importances begin in the values."""

    @property
    def stop(self) -> int:
        return self.start + self.numel

    @property
    def is_protected(self) -> bool:
        return self.rows != ABSENT or self.columns != ABSENT


@dataclass(frozen=True)
class SegmentTable:
    """Importance of every element of a flat tensor of F elements, in memory that does not grow with F."""

    numel: int
    segments: tuple[Segment, ...]
    """In order, without overlap, covering all F elements (see `fill_gaps`)."""
    values: torch.Tensor
    """(V,) float32 in [0, 1], one entry per row or column of a group's parameters; may change in place."""


def fill_gaps(segments: Iterable[Segment], numel: int) -> tuple[Segment, ...]:
    """The segments in order, with unprotected ones in the gaps of a flat tensor of `numel` elements."""
    covered: list[Segment] = []
    position = 0
    for segment in sorted((s for s in segments if s.numel), key=lambda segment: segment.start):
        assert position <= segment.start <= segment.stop <= numel, f"{segment} overlaps or leaves {numel} elements"
        if position < segment.start:
            covered.append(Segment(position, segment.start - position))
        covered.append(segment)
        position = segment.stop
    if position < numel:
        covered.append(Segment(position, numel - position))
    return tuple(covered)


def dense_importance(table: SegmentTable) -> torch.Tensor:
    """(F,) float32: the importance of every element, for reference and small tensors."""
    full = torch.zeros(table.numel, dtype=torch.float32, device=table.values.device)
    for segment in table.segments:
        index = segment.offset + torch.arange(segment.numel, device=full.device)
        importance = full[segment.start : segment.stop]
        if segment.rows != ABSENT:
            importance.copy_(table.values[segment.rows + index // segment.num_columns])
        if segment.columns != ABSENT:
            by_column = table.values[segment.columns + index % segment.num_columns]
            importance.copy_(torch.maximum(importance, by_column))
    return full


UNOWNED_VALUE = 0
"""Index of the importance of all parameters without units, in the values and in the pool they are gathered from."""
NO_OWNER_VALUE = 1
"""Index of a zero in the pool."""


@dataclass(frozen=True)
class ParameterMask:
    """Where one parameter's row and column importances begin in `MaskTable.values`."""

    num_rows: int
    num_columns: int
    rows: int = ABSENT
    columns: int = ABSENT


class MaskTable:
    """Masks of all protected parameters over one small vector of importances.

    Every (group, layer, table of owners) is one range of the vector, expanded to rows or columns; parameters that share
    all three share the range. Parameters that no unit owns have one importance, 1 - unowned_update_scale.

    Args:
        layout: the model's units.
        include_consumers: whether weights that consume a unit are masked with it.
        unowned_update_scale: factor of the update of parameters that no unit owns.
        groups: whose units are masked, as owners and consumers; None: all.
        exponent: p of the mask (1 - I)^p.
        device: where `values` lie.
    """

    def __init__(
        self,
        layout: UnitLayout,
        *,
        include_consumers: bool,
        unowned_update_scale: float,
        groups: Collection[str] | None = None,
        exponent: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        self._groups = tuple(layout.num_units)
        self._exponent = exponent
        # What values are gathered from, see `load`: [unowned, no owner, units of the first group, of the second, ...].
        first_of_group = {}
        position = 2
        for group, num_units in layout.num_units.items():
            first_of_group[group] = position
            position += layout.num_layers * num_units
        starts: dict[tuple[str, int, int], int] = {}
        starts_by_axis: dict[str, dict[int, int]] = {}
        sources = [torch.tensor([[UNOWNED_VALUE]])]
        size = 1
        for item in layout.ownerships:
            is_masked = groups is None or item.group in groups
            if not is_masked or (item.consumer and not include_consumers):
                continue
            # Equal tables of owners are one tensor.
            key = (item.group, item.layer, id(item.units))
            if key not in starts:
                starts[key] = size
                size += len(item.units)
                first_of_layer = first_of_group[item.group] + item.layer * layout.num_units[item.group]
                sources.append(_sources(item, first_of_layer))
            starts_by_axis.setdefault(item.parameter, {})[item.axis] = starts[key]
        # (V, K)
        self._sources = _pad_and_join(sources).to(device)
        # (2,): the importance of unowned parameters, and that of entries without an owner.
        self._constants = torch.tensor([1.0 - unowned_update_scale, 0.0], device=device)
        self.values = torch.zeros(size, dtype=torch.float32, device=device)
        """(V,) float32 in [0, 1]."""
        self.values[UNOWNED_VALUE] = 1.0 - unowned_update_scale
        self.masks: dict[str, ParameterMask] = {}
        owners = layout.owners
        for name, (num_blocks, num_rows, num_columns) in layout.shapes.items():
            if name in starts_by_axis:
                axes = starts_by_axis[name]
                self.masks[name] = ParameterMask(num_rows, num_columns, axes.get(0, ABSENT), axes.get(1, ABSENT))
            elif unowned_update_scale < 1.0 and owners[name] == UNOWNED:
                # One row of all elements, so that the single value serves any shape.
                self.masks[name] = ParameterMask(1, num_blocks * num_rows * num_columns, rows=UNOWNED_VALUE)

    def load(self, importance: UnitValues) -> None:
        """Fill the vector, and with it every segment made from this table, from group -> (L, U)."""
        by_group = [
            apply_exponent(importance[group].flatten().to(self.values), self._exponent) for group in self._groups
        ]
        pool = torch.cat((self._constants, *by_group))
        # (V, K) -> (V,): an entry with several owners is as important as the most important of them.
        self.values.copy_(pool[self._sources].amax(dim=1))

    def segments(self, name: str, *, start: int, offset: int, numel: int) -> list[Segment]:
        """Elements [offset, offset + numel) of a flattened parameter that lie at `start` of a flat tensor."""
        mask = self.masks.get(name)
        if mask is None:
            return [Segment(start, numel)]
        block_size = mask.num_rows * mask.num_columns
        segments = []
        position = offset
        while position < offset + numel:
            # One segment per block: every expert has its own rows and columns.
            block, within_block = divmod(position, block_size)
            length = min(block_size - within_block, offset + numel - position)
            rows = mask.rows if mask.rows == ABSENT else mask.rows + block * mask.num_rows
            columns = mask.columns if mask.columns == ABSENT else mask.columns + block * mask.num_columns
            segments.append(Segment(start + position - offset, length, within_block, mask.num_columns, rows, columns))
            position += length
        return segments


def apply_exponent(importance: torch.Tensor, exponent: float) -> torch.Tensor:
    """I' with 1 - I' = (1 - I)^exponent; 0 and 1 do not change."""
    return importance if exponent == 1.0 else 1.0 - (1.0 - importance).pow(exponent)


def build_lookup_tables(
    owners: dict[str, str],
    *,
    groups: Collection[str] | None,
    unowned_update_scale: float,
    exponent: float,
    num_levels: int,
) -> dict[str, torch.Tensor] | None:
    """Lookup tables from stored importance I to the importance I' that masks:

        1 - I' = (1 - I)^exponent, or 1 outside `groups`; times unowned_update_scale where no unit owns the weight

    Args:
        owners: parameter -> group that owns it, or `UNOWNED`, which `groups` may hold as well.
        groups: whose weights are masked; None: all.
        unowned_update_scale: factor of the update of weights that no unit owns.
        exponent: p of the mask (1 - I)^p.
        num_levels: I and I' count steps of 1 / `num_levels`.

    Returns:
        Parameter -> (num_levels + 1,) uint8, I' of every I; None where I' is I for all.
    """
    importance = torch.arange(num_levels + 1, dtype=torch.float64) / num_levels
    masked = apply_exponent(importance, exponent)
    free = torch.zeros_like(importance)
    tables = {}
    for group in set(owners.values()):
        update_scale = 1.0 - (masked if groups is None or group in groups else free)
        if group == UNOWNED:
            update_scale = update_scale * unowned_update_scale
        tables[group] = ((1.0 - update_scale) * num_levels).round().to(torch.uint8)
    identity = torch.arange(num_levels + 1, dtype=torch.uint8)
    if all(table.equal(identity) for table in tables.values()):
        return None
    return {name: tables[group] for name, group in owners.items()}


def _sources(item: Ownership, first: int) -> torch.Tensor:
    """(A, K): indices of each entry's owners in the pool; entries without an owner find a zero."""
    return torch.where(item.units < 0, NO_OWNER_VALUE, item.units + first)


def _pad_and_join(sources: list[torch.Tensor]) -> torch.Tensor:
    """Tables (A, K) of any K joined to (V, largest K); repeating a row's first owner changes no maximum."""
    width = max(table.shape[1] for table in sources)
    padded = [torch.cat((table, table[:, :1].expand(-1, width - table.shape[1])), dim=1) for table in sources]
    return torch.cat(padded)
