"""`unit_gate` and `measure_gate` in one launch each.

Shape legend: R rows of a packed batch, S positions, U units, D features per unit (F = U * D), B sequences, V views.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_TOKENS = 4
BLOCK_FEATURES = 1024
"""Tile of the scaling kernel, with `BLOCK_TOKENS`."""
MEASURED_POSITIONS = 16
"""Positions that a program of the measuring kernel sums over at a time."""
MEASURED_FEATURES = 128
"""About how many features a program of the measuring kernel has."""


def scale_rows_triton(x: torch.Tensor, gate: torch.Tensor, first_row: int) -> torch.Tensor:
    """Arguments as for `kernels.unit_gate.unit_gate`."""
    scaled = torch.empty_like(x)
    num_rows, num_positions, features = x.shape
    num_tokens = num_rows * num_positions
    if x.numel():
        grid = (triton.cdiv(num_tokens, BLOCK_TOKENS), triton.cdiv(features, BLOCK_FEATURES))
        _scale_rows[grid](
            x,
            gate,
            scaled,
            num_tokens,
            num_positions,
            features,
            gate.shape[1],
            first_row,
            FEATURES_PER_UNIT=features // gate.shape[1],
            ONE_GATE=gate.shape[0] == 1,
            BLOCK_TOKENS=BLOCK_TOKENS,
            BLOCK_FEATURES=BLOCK_FEATURES,
        )
    return scaled


@triton.jit(do_not_specialize=["num_tokens", "num_positions", "first_row"])
def _scale_rows(  # type: ignore[no-untyped-def]
    x,
    gate,
    scaled,
    num_tokens,
    num_positions,
    features,
    num_units,
    first_row,
    FEATURES_PER_UNIT: tl.constexpr,
    ONE_GATE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    # (BLOCK_TOKENS, 1) and (1, BLOCK_FEATURES): a tile of the packed batch seen as (R * S, F).
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    feature = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)[None, :]
    inside = (token < num_tokens) & (feature < features)
    # 64 bits: a packed batch may have more than 2^31 elements.
    element = token.to(tl.int64) * features + feature
    values = tl.load(x + element, mask=inside, other=0.0)
    # Rows before the first gated one have a negative number here, and the factor 1.
    row = token // num_positions - first_row
    gated = inside & (row >= 0)
    unit = feature // FEATURES_PER_UNIT
    if ONE_GATE:
        factor = tl.load(gate + unit + tl.zeros_like(token), mask=gated, other=1.0)
    else:
        factor = tl.load(gate + row * num_units + unit, mask=gated, other=1.0)
    tl.store(scaled + element, (values.to(tl.float32) * factor).to(values.dtype), mask=inside)


def accumulate_triton_(
    x: torch.Tensor, dy: torch.Tensor, sums: torch.Tensor, row_weights: torch.Tensor, num_views: int
) -> None:
    """Arguments as for `kernels.unit_gate.measure_gate`; dy like x."""
    num_sequences, num_units = sums.shape
    features_per_unit = x.shape[2] // num_units
    block_features = triton.next_power_of_2(features_per_unit)
    block_units = max(1, MEASURED_FEATURES // block_features)
    _measure[(num_sequences, triton.cdiv(num_units, block_units))](
        x,
        dy,
        sums,
        row_weights,
        x.shape[1],
        num_sequences,
        num_units,
        NUM_VIEWS=num_views,
        FEATURES_PER_UNIT=features_per_unit,
        BLOCK_UNITS=block_units,
        BLOCK_FEATURES=block_features,
        BLOCK_POSITIONS=MEASURED_POSITIONS,
    )


@triton.jit(do_not_specialize=["num_positions", "num_sequences"])
def _measure(  # type: ignore[no-untyped-def]
    x,
    dy,
    sums,
    row_weights,
    num_positions,
    num_sequences,
    num_units,
    NUM_VIEWS: tl.constexpr,
    FEATURES_PER_UNIT: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    # A program sums over everything that one sequence has in a few units: every entry of `sums` has one writer.
    sequence = tl.program_id(0)
    unit = tl.program_id(1) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    feature = tl.arange(0, BLOCK_FEATURES)
    position = tl.arange(0, BLOCK_POSITIONS)
    # (1, units, features): columns of the units' features; a block is rounded up to powers of 2.
    column = unit[None, :, None] * FEATURES_PER_UNIT + feature[None, None, :]
    exists = (unit[None, :, None] < num_units) & (feature[None, None, :] < FEATURES_PER_UNIT)
    # Summed at the end: one reduction instead of one per step.
    products = tl.zeros((BLOCK_POSITIONS, BLOCK_UNITS, BLOCK_FEATURES), dtype=tl.float32)
    for view in tl.static_range(NUM_VIEWS):
        first_token = (view * num_sequences + sequence).to(tl.int64) * num_positions
        for begin in range(0, num_positions, BLOCK_POSITIONS):
            token = begin + position[:, None, None]
            inside = exists & (token < num_positions)
            element = (first_token + token) * (num_units * FEATURES_PER_UNIT) + column
            output = tl.load(x + element, mask=inside, other=0.0).to(tl.float32)
            products += output * tl.load(dy + element, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.sum(tl.sum(products, axis=2), axis=0)
    entry = sums + sequence * num_units + unit
    is_unit = unit < num_units
    added = tl.load(row_weights + sequence) * tl.abs(gradient)
    tl.store(entry, tl.load(entry, mask=is_unit, other=0.0) + added, mask=is_unit)
