"""Sums of second moments: against float64, in every type and with weights; their normalization."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from das_ds.softmask import input_moments
from das_ds.softmask.input_moments import add_second_moment_, has_mixed_products, normalize_moment_

WEIGHTS = torch.tensor([1.0, 0.0, 0.25, 1.0, 0.7])


def brute_force(x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for number, row in enumerate(x.double()):
        total += (1.0 if weights is None else weights[number].double()) * torch.outer(row, row)
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_add_second_moment_equals_float64(dtype: torch.dtype, weights: torch.Tensor | None) -> None:
    x = torch.randn(5, 7).to(dtype)
    total = torch.eye(7)
    add_second_moment_(total, x, weights)
    torch.testing.assert_close(total.double(), brute_force(x, weights) + torch.eye(7), rtol=1e-6, atol=1e-6)
    unchanged = total.clone()
    add_second_moment_(total, x[:0], None if weights is None else weights[:0])
    assert total.equal(unchanged)


@pytest.mark.parametrize("weights", [None, WEIGHTS, (WEIGHTS == 1).float()])
def test_add_second_moment_mixed_product_equals_float64(
    weights: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The products of a GPU, whose operands stay in 16 bits, by a stand-in: exact products and float32 sums."""
    dtypes: list[torch.dtype] = []

    def mixed(a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
        dtypes.extend((a.dtype, b.dtype, out_dtype))
        return a.to(out_dtype) @ b.to(out_dtype)

    monkeypatch.setattr(input_moments, "multiplies_16_bits", lambda x: x.dtype == torch.bfloat16)
    functions = SimpleNamespace(mm=mixed, float32=torch.float32, mul=torch.mul, empty_like=torch.empty_like)
    monkeypatch.setattr(input_moments, "torch", functions)
    # Three rows of the sum at a time.
    monkeypatch.setattr(input_moments, "PRODUCT_BYTES", 3 * 4 * 7)
    x = torch.randn(5, 7).bfloat16()
    total = torch.zeros(7, 7)
    add_second_moment_(total, x, weights)
    assert dtypes == 3 * [torch.bfloat16, torch.bfloat16, torch.float32]
    # Weights of 0 and 1 leave the inputs as they are; others round each of two factors to 2^-9.
    tolerance = 1e-6 if weights is not WEIGHTS else 2**-7
    torch.testing.assert_close(total.double(), brute_force(x, weights), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(total, total.T)


def test_mixed_products_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """This torch has them for GPUs; on a CPU inputs are cast."""
    assert has_mixed_products()
    assert not input_moments.multiplies_16_bits(torch.zeros(1, 1, dtype=torch.bfloat16))
    on_gpu: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert input_moments.multiplies_16_bits(on_gpu)
    assert not input_moments.multiplies_16_bits(SimpleNamespace(is_cuda=True, dtype=torch.float32))  # type: ignore[arg-type]
    monkeypatch.setattr(input_moments, "has_mixed_products", lambda: False)
    assert not input_moments.multiplies_16_bits(on_gpu)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_normalize_moment_equals_formula(scale: float) -> None:
    x = torch.randn(50, 7) * scale
    total = x.T @ x
    expected = total.double() * 7 / total.double().trace()
    assert normalize_moment_(total)
    torch.testing.assert_close(total, expected.float())


@pytest.mark.parametrize("energy", [0.0, 1e-42, 1e-39])
def test_normalize_moment_without_digits_is_nothing(energy: float) -> None:
    """Its inverse would be infinite in float32."""
    total = torch.full((3, 3), energy)
    assert normalize_moment_(total) and total.equal(torch.zeros(3, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_normalize_moment_not_finite_is_told(value: float) -> None:
    x = torch.ones(4, 3)
    x[2, 1] = value
    assert not normalize_moment_(x.T @ x)
