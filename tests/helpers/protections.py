"""Random protections of flat tensors, cut as no real partition would dare."""

from __future__ import annotations

from typing import Any

import torch

from das_ds.functional.masks import ABSENT, Segment, SegmentTable, fill_gaps
from das_ds.kernels.protection import Protection

KINDS = ("none", "units", "rows", "columns", "both", "gaps", "float32", "bfloat16", "uint8", "all 0", "all 1")


def new_seed() -> int:
    """Another one at every run; tests print it, so that a failure can be repeated."""
    return int(torch.seed() % 2**31)


def random_protection(kind: str, numel: int, generator: torch.Generator, device: str = "cpu") -> Protection:
    """Protection of `numel` elements; importances of exactly 0 and 1 are among them."""
    if kind == "none":
        return Protection(numel)
    if kind in ("float32", "bfloat16", "uint8"):
        importance = _values(numel, generator)
        if kind == "uint8":
            return Protection(numel, importance=(importance * 255).round().to(torch.uint8).to(device))
        return Protection(numel, importance=importance.to(getattr(torch, kind)).to(device))
    segments, num_values = _segments(kind, numel, generator)
    values = _values(num_values, generator)
    if kind in ("all 0", "all 1"):
        values.fill_(float(kind[-1]))
    return Protection(numel, table=SegmentTable(numel, fill_gaps(segments, numel), values.to(device)))


def _segments(kind: str, numel: int, generator: torch.Generator) -> tuple[list[Segment], int]:
    segments: list[Segment] = []
    position = num_values = 0

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    while position < numel:
        num_rows = draw(1, 9)
        num_columns = draw(1, 70)
        offset = draw(0, num_rows * num_columns - 1)
        length = min(num_rows * num_columns - offset, numel - position)
        where: dict[str, Any] = {"rows": ABSENT, "columns": ABSENT}
        if kind in ("rows", "both", "all 0", "all 1") or (kind in ("units", "gaps") and draw(0, 1)):
            where["rows"], num_values = num_values, num_values + num_rows
        if kind in ("columns", "both") or (kind in ("units", "gaps") and draw(0, 1)):
            where["columns"], num_values = num_values, num_values + num_columns
        # One of no elements, as a rank has of a parameter that lies on others.
        segments.append(Segment(position, 0, 0, num_columns, **where))
        segments.append(Segment(position, length, offset, num_columns, **where))
        position += length + (draw(0, 40) if kind == "gaps" else 0)
    return segments, num_values


def _values(numel: int, generator: torch.Generator) -> torch.Tensor:
    values = torch.rand(numel, generator=generator)
    values[::5] = 0.0
    values[3::5] = 1.0
    return values


def inside_poison(values: torch.Tensor, margin: int = 13) -> tuple[torch.Tensor, torch.Tensor]:
    """(full, view): the values as a contiguous view inside NaNs, which nothing may touch."""
    full = torch.full((values.numel() + 2 * margin,), torch.nan, dtype=values.dtype, device=values.device)
    view = full[margin : margin + values.numel()]
    view.copy_(values)
    return full, view


def is_poison_untouched(full: torch.Tensor, view: torch.Tensor) -> bool:
    """Whether everything around the view still is NaN, and nothing in it."""
    return bool(full.isnan().sum() == full.numel() - view.numel()) and not bool(view.isnan().any())
