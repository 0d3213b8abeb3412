"""Virtual gates of units: scale their outputs, or measure the gradient that a gate of ones would have.

Gates are never trained. Where they build o^prev they scale and need no gradient; where importance is measured they are
ones and scale nothing: the gradient of the input is that of the output, and only a sum has to be computed.

Shape legend: R rows of a packed batch, S positions, U units, D features per unit (F = U * D), B sequences, V views of
each (R = V * B), in row order [view 0 | view 1 | ...].
"""

from __future__ import annotations

from typing import Any

import torch

from das_ds.kernels.dispatch import FLOATS, use_triton


def unit_gate(x: torch.Tensor, gate: torch.Tensor, first_row: int) -> torch.Tensor:
    """y[r] = x[r] * g for rows r >= first_row, y[r] = x[r] before; differentiable in x, not in the gate.

    Args:
        x: (R, S, F) float32, bfloat16 or float16, contiguous.
        gate: (1 or R - first_row, U) float32; unit u scales features [u * D, (u + 1) * D).
        first_row: first row that is gated.

    Returns:
        (R, S, F) in x's type; the product is computed in float32 and rounded once.

    Raises:
        ValueError: x or gate of another shape, type or layout.
    """
    _check(x)
    rows = x.shape[0] - first_row
    features = x.shape[2]
    fits = gate.dim() == 2 and gate.shape[0] in (1, rows) and gate.shape[1] and features % gate.shape[1] == 0
    if not fits or gate.dtype != torch.float32:
        raise ValueError(
            f"gate: found {tuple(gate.shape)} {gate.dtype}, expected (1 or {rows}, a divisor of {features}) "
            "torch.float32"
        )
    gated: torch.Tensor = _Scale.apply(x, gate.detach().contiguous(), first_row)
    return gated


def measure_gate(
    x: torch.Tensor, anchor: torch.Tensor, sums: torch.Tensor, row_weights: torch.Tensor, num_views: int
) -> torch.Tensor:
    """x unchanged; its backward pass adds w_n * |dL(x_n) / dg| of a gate g of ones to sums[n] (paper eq. 2).

        dL(x_n) / dg_u = sum over views, positions and the unit's features of dy * x

    Every entry has one writer, so that equal runs give equal sums to the last bit.

    Args:
        x: (V * B, S, F) float32, bfloat16 or float16, contiguous.
        anchor: scalar that requires grad; `torch.autograd.grad(loss, anchor)` walks the graph down to all gates.
        sums: (B, U) float32, contiguous.
        row_weights: (B,) float32 w_n; 0 for rows that only fill the batch.
        num_views: V; the gradients of a sequence's views are added before the absolute value.

    Raises:
        ValueError: a tensor of another shape, type or layout.
    """
    _check(x)
    num_rows, _, features = x.shape
    fits = sums.dim() == 2 and sums.shape[0] * num_views == num_rows and sums.shape[1] and features % sums.shape[1] == 0
    if not fits or sums.dtype != torch.float32 or not sums.is_contiguous():
        raise ValueError(
            f"sums: found {tuple(sums.shape)} {sums.dtype}, expected contiguous ({num_rows} rows / {num_views} views, "
            f"a divisor of {features}) torch.float32"
        )
    if row_weights.shape != (sums.shape[0],):
        raise ValueError(f"row_weights: found {tuple(row_weights.shape)}, expected ({sums.shape[0]},)")
    same: torch.Tensor = _Measure.apply(x, anchor, sums, row_weights, num_views)
    return same


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gate: torch.Tensor, first_row: int) -> torch.Tensor:
        ctx.gate = gate
        ctx.first_row = first_row
        return _scaled(x, gate, first_row)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _scaled(grad_outputs[0].contiguous(), ctx.gate, ctx.first_row), None, None


class _Measure(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        anchor: torch.Tensor,
        sums: torch.Tensor,
        row_weights: torch.Tensor,
        num_views: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, anchor)
        ctx.sums = sums
        ctx.row_weights = row_weights
        ctx.num_views = num_views
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        (dy,) = grad_outputs
        x, anchor = ctx.saved_tensors
        accumulate_(x, dy.contiguous(), ctx.sums, ctx.row_weights, ctx.num_views)
        return dy, torch.zeros_like(anchor), None, None, None


def _scaled(x: torch.Tensor, gate: torch.Tensor, first_row: int) -> torch.Tensor:
    if use_triton("unit_gate", x):
        from das_ds.kernels.unit_gate_triton import scale_rows_triton

        return scale_rows_triton(x, gate, first_row)
    return scale_rows_torch(x, gate, first_row)


def accumulate_(
    x: torch.Tensor, dy: torch.Tensor, sums: torch.Tensor, row_weights: torch.Tensor, num_views: int
) -> None:
    """sums[n] += w_n * |sum over views, positions and features of dy * x|; shapes as for `measure_gate`."""
    if use_triton("measure_gate", x):
        from das_ds.kernels.unit_gate_triton import accumulate_triton_

        accumulate_triton_(x, dy, sums, row_weights, num_views)
    else:
        accumulate_torch_(x, dy, sums, row_weights, num_views)


def scale_rows_torch(x: torch.Tensor, gate: torch.Tensor, first_row: int) -> torch.Tensor:
    """`unit_gate` in torch; both row ranges are written into one output, without the copy of torch.cat."""
    num_units = gate.shape[1]
    scaled = torch.empty_like(x)
    scaled[:first_row] = x[:first_row]
    # (R, S, U, D), so that a gate (1 or R - first_row, U) broadcasts over positions and features.
    shape = (*x.shape[:2], num_units, x.shape[2] // num_units)
    torch.mul(x.view(shape)[first_row:], gate[:, None, :, None], out=scaled.view(shape)[first_row:])
    return scaled


def accumulate_torch_(
    x: torch.Tensor, dy: torch.Tensor, sums: torch.Tensor, row_weights: torch.Tensor, num_views: int
) -> None:
    """`accumulate_` in torch."""
    num_sequences, num_units = sums.shape
    # (V * B, F) -> (B, U): a gate scales all positions and features of its unit, in all views.
    per_feature = (dy.float() * x.float()).sum(dim=1)
    gradient = per_feature.view(num_views, num_sequences, num_units, -1).sum(dim=(0, 3))
    sums.addcmul_(gradient.abs(), row_weights.float()[:, None])


def _check(x: torch.Tensor) -> None:
    if x.dim() != 3 or x.dtype not in FLOATS:
        raise ValueError(
            f"x: found {tuple(x.shape)} {x.dtype}, expected (rows, positions, features) of "
            f"{', '.join(map(str, FLOATS))}"
        )
    if not x.is_contiguous():
        raise ValueError(f"x: found strides {x.stride()}, expected a contiguous tensor")
