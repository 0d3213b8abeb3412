"""Helpers of the Triton kernels over flat tensors: where a program's tile lies, and the importance of its elements.

A program works on the elements of its tile that lie in its segment. Most tiles lie in one segment completely; `FULL`
compiles their loads without a mask, which makes them wide.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(tile, segment_fields, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """First element of a tile, and the part [low, high) of it that lies in the segment."""
    # 64 bits: a flat tensor may have more than 2^31 elements.
    base = tile.to(tl.int64) * TILE
    start = tl.load(segment_fields)
    stop = start + tl.load(segment_fields + 1)
    low = tl.maximum(start - base, 0).to(tl.int32)
    high = tl.minimum(stop - base, TILE).to(tl.int32)
    return base, low, high


@triton.jit
def unit_importance(i, inside, base, low, segment_fields, values, FULL: tl.constexpr):  # type: ignore[no-untyped-def]
    """I of the tile's elements i (float32), max(values[rows + row], values[columns + column]).

    One 64-bit division for the tile; after it 32 bits hold the distance from the beginning of a row.
    """
    rows = tl.load(segment_fields + 4)
    columns = tl.load(segment_fields + 5)
    importance = tl.zeros_like(i).to(tl.float32)
    if (rows >= 0) | (columns >= 0):
        # The tile's first element in the segment, as an element of the flattened matrix: offset + base + low - start.
        first = tl.load(segment_fields + 2) + base + low - tl.load(segment_fields)
        num_columns = tl.load(segment_fields + 3)
        first_row = first // num_columns
        width = num_columns.to(tl.int32)
        # From the beginning of that element's row; 32-bit arithmetic from here on.
        distance = (first - first_row * num_columns).to(tl.int32) + i - low
        row = distance // width
        if rows >= 0:
            importance = load(values + rows + first_row + row, inside, FULL)
        if columns >= 0:
            # distance - row * width is the column.
            by_column = load(values + columns + distance - row * width, inside, FULL)
            importance = tl.maximum(importance, by_column)
    return importance


@triton.jit
def load(pointer, inside, FULL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements of a tile."""
    if FULL:
        return tl.load(pointer)
    return tl.load(pointer, mask=inside, other=0.0)


@triton.jit
def store(pointer, value, inside, FULL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements of a tile."""
    if FULL:
        tl.store(pointer, value)
    else:
        tl.store(pointer, value, mask=inside)


@triton.jit
def as_importance(stored, QUANTIZED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stored importance as float32 in [0, 1]; uint8 counts 255ths.

    A plain division is approximate on a GPU, where 255 / 255 may miss 1; weights with importance 1 must not move.
    """
    if QUANTIZED:
        return tl.div_rn(stored.to(tl.float32), 255.0)
    return stored.to(tl.float32)
