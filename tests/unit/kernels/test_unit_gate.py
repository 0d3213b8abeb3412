"""Gates, in torch and in Triton, against plain autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from das_ds.kernels.unit_gate import accumulate_torch_, measure_gate, scale_rows_torch, unit_gate
from helpers.protections import inside_poison, is_poison_untouched, new_seed

# Triton's interpreter cuts bfloat16 off where a GPU rounds to the nearest.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}
SHAPES = ((5, 3, 7, 3), (4, 1, 1, 5), (1, 130, 33, 1), (6, 17, 3, 64))
"""R, S, U, D."""


def triton_form(name: str) -> Any:
    from das_ds.kernels import unit_gate_triton

    return getattr(unit_gate_triton, name)


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows_in_gate", ["one", "each"])
def test_unit_gate_equals_float64(
    form: str, dtype: torch.dtype, shape: tuple[int, ...], rows_in_gate: str, device: str
) -> None:
    scale = scale_rows_torch if form == "torch" else triton_form("scale_rows_triton")
    num_rows, positions, units, features = shape
    for first_row in {0, num_rows // 2, num_rows - 1}:
        seed = new_seed()
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(num_rows, positions, units * features, generator=generator).to(dtype)
        gate = torch.rand(1 if rows_in_gate == "one" else num_rows - first_row, units, generator=generator)
        gate[0, 0] = 0.0
        gate[-1, -1] = 1.0
        found = scale(x.to(device), gate.to(device), first_row).cpu()
        full = torch.cat((torch.ones(first_row, units), gate.expand(num_rows - first_row, units)))
        expected = x.double() * full.double().repeat_interleave(features, dim=1)[:, None, :]
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=1e-7, msg=f"seed {seed}")
        assert torch.equal(found[:first_row], x[:first_row])


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_views", [1, 2])
def test_measure_gate_sums_equal_float64(
    form: str, dtype: torch.dtype, shape: tuple[int, ...], num_views: int, device: str
) -> None:
    accumulate_ = accumulate_torch_ if form == "torch" else triton_form("accumulate_triton_")
    sequences, positions, units, features = shape
    seed = new_seed()
    generator = torch.Generator().manual_seed(seed)
    size = (num_views * sequences, positions, units * features)
    x, dy = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    weights = (torch.rand(sequences, generator=generator) < 0.7).float()
    before = torch.rand(sequences, units, generator=generator)
    full, flat = inside_poison(before.flatten().to(device))
    accumulate_(x.to(device), dy.to(device), flat.view(sequences, units), weights.to(device), num_views)
    products = (x.double() * dy.double()).view(num_views, sequences, positions, units, features).sum(dim=(0, 2, 4))
    expected = before.double() + weights.double()[:, None] * products.abs()
    # Sums are made in float32 whatever the inputs are, so that one tolerance serves all.
    found = flat.view(sequences, units).double().cpu()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4, msg=f"seed {seed}")
    assert torch.equal(found[weights == 0], before.double()[weights == 0])
    assert is_poison_untouched(full, flat)


def test_unit_gate_gradients_equal_autograd() -> None:
    x = torch.randn(5, 3, 12, requires_grad=True)
    gate = torch.rand(3, 4)
    upstream = torch.randn(5, 3, 12)
    (found,) = torch.autograd.grad(unit_gate(x, gate, 2), x, upstream)
    full = torch.cat((torch.ones(2, 4), gate)).repeat_interleave(3, dim=1)[:, None, :]
    torch.testing.assert_close(found, upstream * full)


def test_measure_gate_is_identity_and_adds_gate_gradient() -> None:
    x = torch.randn(4, 3, 12, requires_grad=True)
    upstream = torch.randn(4, 3, 12)
    sums = torch.zeros(2, 4)
    anchor = torch.zeros((), requires_grad=True)
    y = measure_gate(x, anchor, sums, torch.tensor([1.0, 0.0]), 2)
    assert torch.equal(y, x)
    # An expanded upstream gradient, as a mean gives, is no plain memory.
    dx, of_anchor = torch.autograd.grad(y, (x, anchor), upstream[:, :1].expand_as(x))
    assert torch.equal(dx, upstream[:, :1].expand_as(x)) and of_anchor == 0
    gate = torch.ones(2, 4, requires_grad=True)
    gated = x.detach() * gate.repeat(2, 1).repeat_interleave(3, dim=1)[:, None, :]
    (expected,) = torch.autograd.grad(gated, gate, upstream[:, :1].expand_as(x))
    torch.testing.assert_close(sums, expected.abs() * torch.tensor([[1.0], [0.0]]))


@pytest.mark.parametrize(
    ("x", "gate", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(1, 3), r"x: found \(2, 3\)"),
        (torch.zeros(2, 3, 4).double(), torch.zeros(1, 2), "x: .*torch.float64, expected"),
        (torch.zeros(2, 4, 3).transpose(1, 2), torch.zeros(1, 2), "x: found strides"),
        (torch.zeros(2, 3, 4), torch.zeros(1, 3), r"gate: found \(1, 3\) .*expected \(1 or 2, a divisor of 4\)"),
        (torch.zeros(2, 3, 4), torch.zeros(3, 2), r"gate: found \(3, 2\)"),
        (torch.zeros(2, 3, 4), torch.zeros(1, 2).half(), "gate: found .*float16"),
    ],
)
def test_unit_gate_wrong_gates_raise(x: torch.Tensor, gate: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unit_gate(x, gate, 0)


@pytest.mark.parametrize(
    ("sums", "weights", "message"),
    [
        (torch.zeros(3, 2), torch.ones(3), r"sums: found \(3, 2\) .*expected contiguous \(4 rows / 2 views"),
        (torch.zeros(2, 3), torch.ones(2), "a divisor of 4"),
        (torch.zeros(2, 2).double(), torch.ones(2), "float64, expected contiguous"),
        (torch.zeros(2, 2), torch.ones(4), r"row_weights: found \(4,\), expected \(2,\)"),
    ],
)
def test_measure_gate_wrong_sums_raise(sums: torch.Tensor, weights: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_gate(torch.zeros(4, 3, 4), torch.zeros((), requires_grad=True), sums, weights, 2)
